"""The table of images: in images.csv, in the report, and what its numbers are."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from metric_cases import loop_iou
from report_cases import add_image
from stub_sams import FailingSam

from lightning_samrefine import Refiner, SAMRefineCallback
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.reporting.charts import draw_confusions

COLUMNS = [
    "evaluation", "name", "gain", "miou_raw", "miou_refined", "fixed_px", "broken_px", "swapped_px",
    "regions", "accepted", "seconds", "failed",
]  # fmt: skip


def read(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def expected_rows(sam, dataset):
    """Compute every image's row with numpy, by name."""
    module, refiner, rows = Segmenter().eval(), Refiner(sam, REFINE), {}
    for index in range(len(dataset)):
        image, target = dataset[index]
        with torch.no_grad():
            logits = module.network(image[None] / 255 - 0.5)[0]
        raw, out = logits.argmax(dim=0), refiner(image, logits.softmax(dim=0))
        true = np.isin(range(NUM_CLASSES), target)
        iou = [
            loop_iou(labels, target, NUM_CLASSES, IGNORE)[true].mean()
            for labels in (raw, out.labels)
        ]
        changed, true = (raw != out.labels) & (target != IGNORE), target
        rows[f"batch {index // 2}, image {index % 2}"] = {
            "gain": iou[1] - iou[0],
            "miou_raw": iou[0],
            "miou_refined": iou[1],
            "fixed_px": int((changed & (out.labels == true)).sum()),
            "broken_px": int((changed & (raw == true)).sum()),
            "swapped_px": int((changed & (raw != true) & (out.labels != true)).sum()),
            "regions": len(out.regions),
            "accepted": len(out.pred_iou),
        }
    return rows


@pytest.mark.slow
def test_images_csv_beside_the_report(make, random_sam, tmp_path):
    callback = make(report=True)
    trainer = Trainer(
        **{**SILENT, "logger": CSVLogger(tmp_path, name="", version="")}, callbacks=[callback]
    )
    trainer.validate(Segmenter(), loader(5), verbose=False)
    rows = read(tmp_path / "images.csv")
    expected = expected_rows(random_sam, Blobs(5))
    assert {row["evaluation"] for row in rows} == {"val"}
    assert [row["name"] for row in rows] == sorted(
        expected, key=lambda name: expected[name]["gain"]
    )
    for row in rows:
        found = {key: float(row[key]) for key in expected[row["name"]]}
        assert found == pytest.approx(expected[row["name"]], abs=1e-6)
        assert row["failed"] == "False"
    seconds = sum(float(row["seconds"]) for row in rows)
    assert seconds == pytest.approx(callback.history[0]["refine_ms_per_image"] * 5 / 1000, rel=1e-3)
    trainer.test(Segmenter(), [loader(1), loader(2)], verbose=False)
    titles = [row["evaluation"] for row in read(tmp_path / "images.csv")]
    assert titles == ["test, dataloader 0", *["test, dataloader 1"] * 2, *["val"] * 5]
    # Without a report nothing is written.
    other = Trainer(**SILENT, default_root_dir=tmp_path / "other", callbacks=[make()])
    other.validate(Segmenter(), loader(1), verbose=False)
    assert not (tmp_path / "other").exists()


def test_an_image_that_could_not_be_refined(tmp_path):
    fourth = Blobs(5).images[3]
    sam = FailingSam(lambda images: any(torch.equal(image, fourth) for image in images))
    callback = SAMRefineCallback(
        sam, num_classes=NUM_CLASSES, refine=REFINE, report=tmp_path / "fast_report.html"
    )
    trainer = Trainer(**SILENT, default_root_dir=tmp_path, callbacks=[callback])
    with pytest.warns(RuntimeWarning, match="this image fails"):
        trainer.validate(Segmenter(), loader(5), verbose=False)
    (failed,) = (row for row in read(tmp_path / "fast_images.csv") if row["failed"] == "True")
    assert failed["name"] == "batch 1, image 1"
    assert float(failed["gain"]) == int(failed["regions"]) == 0
    page = (tmp_path / "fast_report.html").read_text(encoding="utf-8")
    assert page.count('class="open"') == 5
    assert "batch 1, image 1</button> (could not be refined)" in page


def test_confusions_are_those_of_the_label_maps():
    comparison = RefinementComparison(4, 255, ("sky", "road", "car", "pole"))
    seen = []

    class Keep:
        def add(self, name, image, raw, refined, target, regions, found):
            seen.append([one.numpy() for one in (raw, refined, target)])

    for index in range(3):
        add_image(comparison, Keep(), index, (48, 64))
    axes = draw_confusions(comparison.result(), most=5).axes[0]
    raw, refined, target = (np.concatenate(one) for one in zip(*seen, strict=True))
    names, counts = comparison.class_names, {}
    for i, true in enumerate(names):
        for j, called in enumerate(names):
            if i != j:
                pair = [int(((target == i) & (one == j)).sum()) for one in (raw, refined)]
                counts[f"{true} → {called}"] = pair
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert sorted(max(counts[label]) for label in labels) == sorted(map(max, counts.values()))[-5:]
    for side, container in enumerate(axes.containers):
        assert [bar.get_width() for bar in container] == [counts[label][side] for label in labels]
    changes = [text.get_text().strip() for text in axes.texts]
    assert changes == [f"{counts[label][1] - counts[label][0]:+,}" for label in labels]
