"""The report: complete in one file, small, and usable in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tracemalloc
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from report_cases import add_image, blob_image, evaluate

from lightning_samrefine.callbacks.presenter import sample_names
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.reporting.image_table import ImageRow
from lightning_samrefine.reporting.report import Gallery, ReportSection, write_report
from lightning_samrefine.reporting.report.thumbnails import image_tiles

FACTS = {"Command": {"": "samrefine data=folder"}, "Thresholds": {"stride": "2"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two evaluations."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    history = [
        {"epoch": epoch, "miou_raw": 0.3, "miou_refined": 0.4,
         "trimap_miou_raw": 0.2, "trimap_miou_refined": 0.3}
        for epoch in range(3)
    ]  # fmt: skip
    test, val = evaluate(7), evaluate(3)
    # The gallery has pictures of the first alone.
    names = ("image 0003", "image <b>")
    rows = [
        ImageRow(name, 0.1 - i, 0.2, 0.3, 5, 4, 3, 6, 2, 0.1, False) for i, name in enumerate(names)
    ]
    sections = [
        ReportSection("test", None, *test, rows=rows),
        ReportSection("val", 2, *val, history),
    ]
    write_report(path, sections, FACTS)
    return path, test[0]


def picture(uri):
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return Image.open(io.BytesIO(data))


def test_the_page_needs_nothing_but_itself(page):
    text = page[0].read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org|purl\.org|creative)", text)
    assert "@@" not in text
    seen = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            identity = dict(attributes).get("id")
            if identity:
                seen.append(identity)

    Tags().feed(text)
    assert len(seen) == len(set(seen)), "ids are unique across charts and sections"


def test_the_page_has_what_was_measured(page):
    path, result = page
    text = path.read_text(encoding="utf-8")
    figures = result.figures()
    assert f"{100 * figures['miou_raw']:.2f} → {100 * figures['miou_refined']:.2f} %" in text
    low, high = (100 * figures[f"miou_gain_{end}"] for end in ("low", "high"))
    assert f"95% interval {low:+.2f} to {high:+.2f}" in text
    assert "car &lt;i&gt;" in text, "class names are escaped"
    assert "car <i>" not in text
    assert "samrefine data=folder" in text
    for value in (figures["refine_fixed_px"], figures["refine_broken_px"]):
        assert f">{value:.0f}</dd>" in text
    for name in ("boundary_iou", "trimap_miou"):
        assert f"{100 * figures[f'{name}_refined']:.2f}" in text


def test_a_loss_that_only_a_class_of_no_target_makes_is_no_verdict(tmp_path):
    comparison = RefinementComparison(3, class_names=("sky", "road", "book"))
    target = torch.arange(100).reshape(10, 10) // 50
    raw, refined = target.clone(), target.clone()
    raw[4] = 1  # ten pixels of sky called road
    refined[0, 0] = 2  # all of them right again, and one pixel of a book that is not there
    for _ in range(3):
        comparison.update(raw, refined, target)
    result = comparison.result()
    assert result.figures()["miou_gain_high"] < 0 < result.figures()["miou_gain_same_classes"]
    path = tmp_path / "report.html"
    write_report(path, [ReportSection("test", None, result, Gallery(3))], FACTS)
    text = path.read_text(encoding="utf-8")
    assert "makes these masks" not in text
    assert "<p>Over the classes of both means there is no such difference.</p>" in text
    assert "(refined: book); over the 2 classes of both means the gain is +" in text


def test_the_most_changed_images_come_first_up_to_the_maximum():
    _, gallery = evaluate(6, max_images=4)
    kept = [json.loads(text) for text in gallery.images()]
    _, everything = evaluate(6)
    changed = [json.loads(text) for text in everything.images()]
    assert [entry["name"] for entry in kept] == [entry["name"] for entry in changed[:4]]
    moved = [entry["fixed"] + entry["broken"] for entry in changed]
    assert moved == sorted(moved, reverse=True)
    assert (gallery.images_seen, len(changed)) == (6, 6)


def test_regions_are_the_best_the_worst_and_the_rejected():
    result, gallery = evaluate(8)
    found = [json.loads(text) for text in gallery.regions()]
    kinds = [entry["kind"] for entry in found]
    assert kinds == sorted(kinds, key=["best", "worst", "rejected"].index)
    gains = {kind: [e["after"] - e["before"] for e in found if e["kind"] == kind] for kind in kinds}
    assert gains["best"] == pytest.approx(sorted(gains["best"], reverse=True), abs=2e-4)
    assert gains["worst"] == pytest.approx(sorted(gains["worst"]), abs=2e-4)
    assert min(gains["best"]) >= 0 >= max(gains["worst"])
    rejected = [entry["pred"] for entry in found if entry["kind"] == "rejected"]
    assert 0 <= min(rejected) <= max(rejected) <= 0.3
    assert 0 < len(found) <= result.calibration.regions
    assert max(picture(entry["crop"]).size for entry in found) <= (132, 132)


def test_galleries_of_several_processes_make_the_gallery_of_one():
    _, whole = evaluate(7, max_images=5)
    comparison = RefinementComparison(4, 255)
    parts = [Gallery(4, 255, max_images=5) for _ in range(2)]
    for index in range(7):
        add_image(comparison, parts[index % 2], index, (48, 64))
    parts[0].absorb(parts[1].export())
    assert list(parts[0].images()) == list(whole.images())
    assert list(parts[0].regions()) == list(whole.regions())
    assert parts[0].images_seen == 7


def test_a_full_disk_costs_the_rest_of_the_gallery_alone(monkeypatch):
    comparison, gallery = RefinementComparison(4, 255), Gallery(4, 255)
    add_image(comparison, gallery, 0, (48, 64))

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            raise OSError("no space left on device")

    file = gallery._file
    monkeypatch.setattr(gallery, "_file", Full())
    with pytest.warns(RuntimeWarning, match="no image from image 0001 on .*no space left"):
        add_image(comparison, gallery, 1, (48, 64))
    add_image(comparison, gallery, 2, (48, 64))
    assert [json.loads(text)["name"] for text in gallery.images()] == ["image 0000"]
    assert len(comparison.result().totals) == 3


def test_one_changed_pixel_is_seen_in_a_tile():
    image = torch.zeros(3, 600, 800, dtype=torch.uint8)
    target = torch.zeros(600, 800, dtype=torch.int64)
    raw, refined = target.clone(), target.clone()
    raw[301, 401] = 1  # fixed
    refined[100, 100] = 1  # broken
    tiles = image_tiles(image, raw, refined, target, target >= 0, 2)
    changed = picture(tiles["changed"])
    assert changed.size == (240, 180)
    colors = {color for _, color in changed.getcolors() if color[3]}
    assert colors == {(25, 195, 125, 255), (255, 64, 64, 255)}


def test_an_image_of_one_pixel_and_one_without_a_scored_pixel_are_shown():
    comparison, gallery = RefinementComparison(3, 255), Gallery(3, 255)
    for hw in ((1, 1), (5, 700)):
        image, raw, refined, target, regions = blob_image(0, hw, 3)
        target[:] = 255
        (found,) = comparison.update(raw, refined, target, regions)
        gallery.add(str(hw), image, raw, refined, target, regions, found)
    entries = [json.loads(text) for text in gallery.images()]
    assert [entry["raw"] for entry in entries] == [None, None]
    assert list(gallery.regions()) == []


def test_a_report_of_nothing_scored_is_still_a_page(tmp_path):
    comparison, gallery = RefinementComparison(3, 255), Gallery(3, 255)
    _, raw, refined, target, _ = blob_image(0, (8, 9), 3)
    comparison.update(raw, refined, torch.full_like(target, 255))
    path = tmp_path / "new" / "report.html"
    write_report(path, [ReportSection("val", None, comparison.result(), gallery)], FACTS)
    assert "No pixel was scored." in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="sections must be at least one, got none"):
        write_report(path, [], FACTS)


@pytest.mark.slow
def test_a_thousand_images_stay_small(tmp_path):
    """Ten images of a photograph's size stand for a thousand, text and charts counted once."""
    sizes = []
    for images in (2, 12):
        path = tmp_path / f"{images}.html"
        write_report(path, [ReportSection("val", None, *evaluate(images, (360, 480)))], FACTS)
        sizes.append(path.stat().st_size)
    regions = 96 * 7_000  # as many crops as there can be
    assert (sizes[1] - sizes[0]) / 10 * 1000 + sizes[0] + regions < 30e6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    comparison, gallery = RefinementComparison(4, 255), Gallery(4, 255)
    for index in range(20):
        add_image(comparison, gallery, index, (24, 32))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for index in range(20, 120):
        add_image(comparison, gallery, index, (24, 32))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Tensors' data are not traced: they are counted here.
    tensors = sum(rows.numel() for rows in comparison.images.rows) * 4
    assert (after - before + tensors) / 100 < 5000


def test_samples_are_named_by_the_batch_or_by_their_place():
    batch = {"image": torch.zeros(2, 3, 4, 4), "name": ["a.png", "b.png"]}
    assert sample_names(batch, 2, "batch 0") == ["a.png", "b.png"]
    nested = {"image": batch["image"], "meta": {"image_id": torch.tensor([7, 9])}}
    assert sample_names(nested, 2, "batch 0") == ["7", "9"]
    batch["name"] = torch.zeros(2)
    assert sample_names(batch, 2, "batch 7") == ["batch 7, image 0", "batch 7, image 1"]
    assert sample_names([torch.zeros(1)], 1, "batch 1") == ["batch 1, image 0"]


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra: dev)")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--window-size=1280,1600",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.slow
@pytest.mark.browser
def test_a_reader_sorts_opens_and_sees_no_error(page, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(page[0].as_uri())

    def column(number):
        cells = browser.find_elements(By.CSS_SELECTOR, "#classes-0 tbody tr")
        return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in cells]

    def names():
        labels = browser.find_elements(By.CSS_SELECTOR, "#section-0 .cards.images .label")
        return [label.text for label in labels]

    assert column(0) == ["sky", "road", "car <i>", "pole"]
    head = browser.find_elements(By.CSS_SELECTOR, "#classes-0 thead button")
    head[4].click()
    gains = [float(text) for text in column(4)]
    assert gains == sorted(gains, reverse=True)
    head[0].send_keys(Keys.ENTER)  # the keyboard does what the mouse does
    assert column(0) == ["car <i>", "pole", "road", "sky"]
    sorted_by = browser.find_elements(By.CSS_SELECTOR, "#classes-0 th[aria-sort=ascending]")
    assert [cell.text for cell in sorted_by] == ["class"]

    best_first = names()
    assert len(best_first) == 7
    order = browser.find_element(By.CSS_SELECTOR, "#section-0 .gallery select")
    order.send_keys("name")
    assert [text[:10] for text in names()] == [f"image {index:04d}" for index in range(7)]

    first = browser.find_element(By.CSS_SELECTOR, "#section-0 button.card")
    first.send_keys(Keys.ENTER)
    viewer = browser.find_element(By.ID, "viewer")
    title = browser.find_element(By.ID, "viewer-title")
    assert viewer.is_displayed()
    assert title.text == "image 0000"
    tiles = browser.find_elements(By.CSS_SELECTOR, "#viewer-tiles figure")
    assert len(tiles) == 5
    loaded = "return [...document.querySelectorAll('#viewer img')].every(i => i.naturalWidth > 0)"
    assert browser.execute_script(loaded)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#viewer svg rect")) == 6
    browser.save_screenshot(str(tmp_path / "opened.png"))
    assert len(Image.open(tmp_path / "opened.png").convert("RGB").getcolors(1 << 22)) > 50
    viewer.send_keys(Keys.ARROW_RIGHT)
    assert title.text == "image 0001"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not viewer.is_displayed()

    browser.find_element(By.CSS_SELECTOR, "#section-0 summary").click()
    rows = browser.find_elements(By.CSS_SELECTOR, "table[data-section] .open")
    assert [row.text for row in rows] == ["image <b>", "image 0003"], "the largest loss first"
    browser.find_elements(By.CSS_SELECTOR, "table[data-section] thead button")[3].click()
    rows = browser.find_elements(By.CSS_SELECTOR, "table[data-section] .open")
    assert [row.is_enabled() for row in rows] == [True, False]
    rows[0].click()
    assert viewer.is_displayed()
    assert title.text == "image 0003"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)

    for width in (1280, 400):
        browser.set_window_size(width, 900)
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(script) <= 0, f"scrolls sideways at {width} px"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert errors == []
