"""Panels show the extremes of an evaluation, and colors that tell classes apart."""

import base64
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_samrefine.refine.results import Regions
from lightning_samrefine.reporting.charts import draw_curve
from lightning_samrefine.reporting.loggers import rasterize
from lightning_samrefine.reporting.panels import (
    Panel,
    PanelPicker,
    change_kinds,
    draw_panels,
    save_figure,
)
from lightning_samrefine.reporting.report.thumbnails import image_tiles
from lightning_samrefine.utils.palette import class_colors, colorize


def regions():
    return Regions(
        classes=torch.tensor([0, 1]),
        boxes=torch.tensor([[0.0, 0, 4, 6], [6, 0, 10, 6]]),
        extents=torch.tensor([[0.0, 0, 6, 8], [6, 0, 12, 8]]),
        points=torch.tensor([[3.0, 4], [9, 4]]),
        scores=torch.tensor([0.9, 0.8]),
        pred_iou=torch.tensor([0.95, 0.3]),
        accepted=torch.tensor([True, False]),
    )


def offer(picker, name, fixed, broken, total=100):
    """Offer a 10 × 10 image whose refinement turns given numbers of pixels right and wrong."""
    target = torch.zeros(total, dtype=torch.int64)
    raw, refined = target.clone(), target.clone()
    raw[:fixed] = 1
    refined[fixed : fixed + broken] = 1
    side = int(total**0.5)
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    maps = (labels.view(side, side) for labels in (raw, refined, target))
    picker.offer(name, image, *maps, torch.ones(side, side, dtype=torch.bool), regions())


def test_the_picker_keeps_both_ends_of_any_stream():
    gains = np.random.default_rng(0).permutation(np.arange(-20, 21))
    picker = PanelPicker(5)
    for gain in gains:
        offer(picker, str(gain), fixed=max(gain, 0), broken=max(-gain, 0))
    kept = [panel.gain for panel in picker.panels()]
    assert kept == pytest.approx([0.20, 0.19, 0.18, -0.19, -0.20])


def test_one_panel_is_the_best_one_and_none_is_none():
    one, none = PanelPicker(1), PanelPicker(0)
    for gain in (1, 7, 3):
        offer(one, str(gain), fixed=gain, broken=0)
        offer(none, str(gain), fixed=gain, broken=0)
    assert [panel.name for panel in one.panels()] == ["7"]
    assert none.panels() == []


def test_pickers_of_several_processes_make_one():
    whole, parts = PanelPicker(3), [PanelPicker(3), PanelPicker(3)]
    for index, gain in enumerate((1, 7, -3, 4, -9, 0)):
        for picker in (whole, parts[index % 2]):
            offer(picker, str(gain), fixed=max(gain, 0), broken=max(-gain, 0))
    parts[0].merge(parts[1].panels())
    assert [panel.name for panel in parts[0].panels()] == ["7", "4", "-9"]
    assert [panel.name for panel in whole.panels()] == ["7", "4", "-9"]


def test_changed_pixels_are_fixed_broken_or_swapped():
    raw, refined, target = torch.tensor([[0, 1, 1, 2, 0], [1, 1, 2, 0, 1], [1, 0, 1, 1, 255]])
    kinds = change_kinds(raw[None], refined[None], target[None], (target < 3)[None])
    assert kinds.tolist() == [[1, 0, 2, 3, 0]]


def test_colors_differ_and_unknown_is_black():
    colors = class_colors(40).astype(int)
    distances = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1000 * np.eye(40, dtype=int)
    assert distances.min() > 10
    assert (colors.sum(axis=1) > 60).all()
    labels = torch.tensor([[0, 1, 255, -1]])
    picture = colorize(labels, 2, torch.tensor([[True, False, True, True]]))
    assert (picture[0, 0] == colors[0]).all()
    assert not picture[0, 1:].any()


def test_a_figure_shows_labels_where_they_are(tmp_path):
    picker = PanelPicker(2)
    offer(picker, "a", fixed=30, broken=0)
    offer(picker, "b", fixed=0, broken=10)
    figure = draw_panels(picker.panels(), ["sky", "road"], "val, epoch 3")
    raw_axes = figure.axes[1]
    shown = np.asarray(raw_axes.images[0].get_array())
    assert (shown[:3] == class_colors(2)[1]).all()
    assert (shown[3:] == class_colors(2)[0]).all()
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"sky", "road"}
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.95", "0.30"]
    changed = np.asarray(figure.axes[4].images[0].get_array())
    assert (changed[:3] == (25, 195, 125)).all(), "fixed pixels are green"
    assert not changed[3:].any()
    save_figure(figure, tmp_path / "new" / "panels.png")
    assert Image.open(tmp_path / "new" / "panels.png").size[0] == 1600
    with pytest.raises(ValueError, match="panels must be at least one, got none"):
        draw_panels([], ["sky"], "")


@pytest.mark.parametrize("hw", [(1500, 4), (4, 1500), (20_000, 1), (1, 20_000)])
def test_slivers_make_panels_and_tiles_of_a_bounded_size(hw):
    labels = torch.zeros(hw, dtype=torch.int64)
    image = torch.zeros(3, *hw, dtype=torch.uint8)
    valid = torch.ones(hw, dtype=torch.bool)
    panels = [
        Panel("sliver", 0.1, image, labels, labels, labels, valid, regions()),
        Panel("photo", 0.0, *_photo(), regions()),
    ]
    for shown in (panels, panels[::-1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as axes that collapse to nothing
            picture = rasterize(draw_panels(shown, ["sky", "road"], "sliver"), 1600)
        assert picture.width == 1600
        assert 300 < picture.height < 1200
    tiles = image_tiles(image, labels, labels, labels, valid, 2)
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
        for uri in tiles.values()
    }
    (size,) = sizes
    assert size[0] <= 240
    assert size[1] <= 960


def _photo():
    labels = torch.zeros(30, 40, dtype=torch.int64)
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    return image, labels, labels, labels, torch.ones(30, 40, dtype=torch.bool)


def test_rows_are_as_high_as_their_own_images():
    tall = torch.zeros(80, 40, dtype=torch.int64)
    panels = [
        Panel("wide", 0.1, *_photo(), regions()),
        Panel(
            "tall", 0.0, torch.zeros(3, 80, 40, dtype=torch.uint8), tall, tall, tall, tall == 0,
            regions(),
        ),
    ]  # fmt: skip
    heights = draw_panels(panels, ["sky", "road"], "").axes[0].get_gridspec().get_height_ratios()
    assert heights == pytest.approx([3.2 * 30 / 40, 3.2 * 80 / 40])


def test_a_picture_of_any_number_of_rows_is_bounded():
    from matplotlib.figure import Figure

    picture = rasterize(Figure(figsize=(2, 2000)), 400)
    assert picture.height == 32_000
    assert picture.width == 32


def test_the_curve_has_one_point_an_epoch():
    history = [
        {"epoch": epoch, "miou_raw": 0.3 + epoch / 10, "miou_refined": 0.4 + epoch / 10,
         "trimap_miou_raw": 0.2, "trimap_miou_refined": 0.3}
        for epoch in range(3)
    ]  # fmt: skip
    axes = draw_curve(history).axes
    raw, refined = axes[0].lines
    assert list(raw.get_xdata()) == [0, 1, 2]
    assert list(refined.get_ydata()) == pytest.approx([40, 50, 60])
    with pytest.raises(ValueError, match="history must have at least one evaluation"):
        draw_curve([])
