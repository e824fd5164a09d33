"""Two gloo processes log what one process logs, bit for bit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import ddp_layouts
import ddp_run
import pytest
from scripts import run_script

pytestmark = pytest.mark.slow


def read(folder: Path, devices: int) -> list[list[dict[str, float]]]:
    """Return every rank's evaluations, without the times that they took."""
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(devices)]
    for seen in ranks:
        for figures in seen:
            for name in [name for name in figures if "refine_ms" in name]:
                assert figures.pop(name) > 0
    return ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where one process left what it saw."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.warns(RuntimeWarning, match="this image fails"):
        ddp_run.run("auto", 1, folder)
    return folder


@pytest.fixture(scope="module")
def single(folder) -> list[dict[str, float]]:
    return read(folder, 1)[0]


def shown(folder: Path) -> list[tuple[list[dict], list[dict]]]:
    """Return the images and regions of a report, without the names, which say the process."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = []
    for section in range(2):
        arrays = []
        for kind in ("images", "regions"):
            (array,) = re.findall(rf'id="{kind}-{section}">(\[.*?\])</script>', text, re.DOTALL)
            entries = [{**entry, "name": ""} for entry in json.loads(array)]
            arrays.append(sorted(entries, key=str))
        found.append((arrays[0], arrays[1]))
    return found


def test_ddp_equals_one_process_on_every_rank(folder, single, tmp_path):
    done = run_script(ddp_run, "ddp", "2", tmp_path)
    assert "sync_dist" not in done.stderr, "Lightning warned that ranks might differ"
    assert done.stderr.count("the 5 images were measured 2 times each") == 1
    ranks = read(tmp_path, 2)
    assert ranks[0] == ranks[1]
    assert ranks[0] == single
    two_loaders, failing, fitted, refined, sanity_check, *epochs = single
    assert "val/miou_refined/dataloader_idx_1" in two_loaders
    # The user's metric, too; one rank has no image of the second loader.
    for number in (0, 1):
        own = two_loaders[f"val/MulticlassJaccardIndex_refined/dataloader_idx_{number}"]
        ours = two_loaders[f"val/miou_refined/dataloader_idx_{number}"]
        assert own == pytest.approx(ours, abs=1e-6)
    assert failing["val/refine_failed_images"] == 1
    assert fitted["val/miou_refined"] != refined["val/miou_refined"]
    assert fitted["val/fitted_gain"] == pytest.approx(refined["val/fitted_gain"])
    assert sanity_check == {}
    assert len(epochs) == 2, "EarlyStopping saw equal values and stopped after its patience"
    assert list(tmp_path.glob("*.ckpt"))
    # The report of rank zero holds the other rank's images, and so do the panels.
    assert shown(tmp_path) == shown(folder)
    assert [len(images) for images, _ in shown(tmp_path)] == [5, 1]
    names = {path.relative_to(folder) for path in folder.rglob("*.png")}
    assert len(names) == 2
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")} == names


def test_ddp_spawn_pickles_the_callback(single, tmp_path):
    ddp_run.run("ddp_spawn", 2, tmp_path)
    ranks = read(tmp_path, 2)
    assert ranks[0] == ranks[1]
    (figures,) = ranks[0]
    of_first_loader = {
        name.removesuffix("/dataloader_idx_0"): value
        for name, value in single[0].items()
        if name.endswith("/dataloader_idx_0")
    }
    assert figures == of_first_loader


@pytest.mark.skipif(sys.platform != "linux", reason="forks its processes")
def test_uneven_layouts_log_what_one_process_logs(tmp_path):
    # All of them are in benchmarks/RELIABILITY.md; these include sharded weights (fully_shard).
    done = run_script(ddp_layouts, tmp_path, "short")
    compared = json.loads(done.stdout.splitlines()[-1])
    assert compared["layouts"] == 5
    assert compared["by_strategy"] == {"ddp": 4, "model_parallel": 1}
