"""The page of `benchmarks.speed`: what it claims follows from the figures it is given."""

import json
from collections import defaultdict

import pytest
import torch

from benchmarks import speed, speed_report
from benchmarks.speed_bars import bars

STEPS = {"encoder": 0.34, "regions": 0.002, "prompts": 0.001, "decoder": 0.045}
STEPS["upscaling and fusion"] = 0.01


def costs(neither=1.0):
    """A case's ratios; ``neither`` scales what is neither encoder nor decoder."""
    spent = {s: v * (1 if s in ("encoder", "decoder") else neither) for s, v in STEPS.items()}
    figures = {"literal encoder": 1.0, "literal rest": 0.4, "official decoder": 0.23}
    for precision in ("32", "bf16-mixed"):
        for epoch, total in (("first", sum(spent.values())), ("second", 0.06)):
            figures |= {f"{precision} {epoch} {step}": value for step, value in spent.items()}
            figures[f"{precision} {epoch} total"] = total
    return figures


def figures(model="vit_b", where="1 core", floor=0.29, large=3.0):
    cases = [(40, 720, 1.0), (160, 720, 3.5), (40, 1440, large), (160, 1440, large * 3.5)]
    return {
        "model": model,
        "trained": model == "vit_t",
        "where": where,
        "machine": "a machine",
        "encoders": {
            "segment-anything, float32": 1.0,
            "ours, bf16 autocast": 0.34,
            "floor: its matrix products alone, bf16": floor,
        },
        "refinements": [
            {"regions": n, "height": h, "width": h * 4 // 3, "costs": costs(neither)}
            for n, h, neither in cases
        ],
        "peaks": {"encoder, ours, bf16": 0.07, "whole, ours, bf16": 0.09},
        "errors": [6.6e-3, 1.2e-6],
    }


def reached(text):
    """Return the last column of the table of bars by its first."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1].strip() for row in rows[2:]}


def test_bars_are_judged_by_the_figures():
    found = reached(bars({"vit_b, 1 core": figures(large=4.1)}))
    assert found["encoder"] == "no"
    assert found["decoder and prompts, faster"] == "yes"
    assert found["all but encoder and decoder"] == "yes"
    assert found["first epoch, faster than the reference"] == "no"
    assert found["second epoch, faster than the reference"] == "yes"
    assert found["growth of all but encoder and decoder: `vit_b`, 40 to 160 regions"] == "yes"
    assert (
        found["growth of all but encoder and decoder: `vit_b`, 40 regions, 4 times the pixels"]
        == "no"
    )
    assert not any("vit_t" in name or "labels" in name for name in found)


def test_the_arithmetic_is_that_of_the_figures():
    text = bars({"vit_b, 1 core": figures()})
    assert "softmax and norms, take 0.29. This package" in text
    assert "1.40 / 4.5 = 0.31, which leaves 0.02 for" in text
    over = bars({"vit_b, 1 core": figures(floor=0.33)})
    assert "which is 0.02 less than these products take for" in over
    # With a floor that is low enough, no target is out of reach.
    assert "out of reach" not in bars({"vit_b, 1 core": figures(floor=0.15)})
    assert "A first epoch" not in bars({"vit_b, 1 core": figures(floor=0.15)})


@pytest.fixture
def files(tmp_path, monkeypatch):
    for module in (speed_report, speed):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "speed.json")
    monkeypatch.setattr(speed_report, "PAGE", tmp_path / "SPEED.md")
    return tmp_path


def test_core_counts_measured_apart_share_a_page(files):
    speed.keep({"vit_b, 1 core": figures()})
    speed.keep({"vit_b, 2 cores": figures(where="2 cores"), "bf16": None})
    page = (files / "SPEED.md").read_text()
    assert page.index("## vit_b, random weights, 1 core") < page.index("weights, 2 cores")
    assert "## Targets" in page
    assert page.count("a machine") == 1
    assert page == speed_report.page(json.loads((files / "speed.json").read_text()))


def test_presets_stand_beside_what_was_measured_before(files):
    cold, cached = {"default cold": 0.9, "fast cold": 0.5}, {"default cached": 0.2}
    every = {"our encoder": 0.3, **cold, **cached, "fast cached": 0.1}
    speed.keep({"vit_b, 1 core": figures()})
    speed.keep({"presets": {"machine": "a machine", "pairs": {"scenes": every, "all": every}}})
    page = (files / "SPEED.md").read_text()
    assert "## vit_b, random weights, 1 core" in page
    assert "measured 0.90, which is 3.0 forwards of this package's encoder (0.30)" in page
    assert "| `default` | first look | 0.90 | 0.90 |" in page
    assert "| `fast` | cached | 0.10 | 0.10 |" in page


@pytest.mark.slow
def test_every_step_of_a_refinement_is_measured(random_sam, tmp_path):
    costs = defaultdict(list)
    speed.measure_refinements(random_sam, 4, (48, 64), tmp_path, costs)
    for precision in ("32", "bf16-mixed"):
        for step in ("regions", "prompts", "encoder", "decoder", "upscaling and fusion", "total"):
            assert costs[f"{precision} first {step}"][0] > 0, step
        assert not costs[f"{precision} second encoder"]


@pytest.mark.slow
def test_looks_with_and_without_the_padding_are_measured(random_sam, monkeypatch):
    monkeypatch.setattr(speed, "model", lambda name, device: (random_sam, False))
    monkeypatch.setattr(speed, "SHAPES", ((48, 96),))
    found = speed.measure_paddings("random", 1, 1, torch.device("cpu"))
    costs = found["shapes"]["48x96"]
    for look in ("padded", "unpadded"):
        for kind in ("encoder", "first", "new", "cached"):
            assert costs[f"{look} {kind}"] > 0
    page = speed_report.padding({"padding": {"random, 1 core": found}})
    assert "| random, 1 core, 48x96, unpadded |" in page
