"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, and a command that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny_random_sam import OfficialSam, build_random_sam

from lightning_samrefine.models.sam import SamPromptable


@pytest.fixture(scope="session")
def random_sam() -> SamPromptable:
    """A small random SAM whose predicted IoUs spread over (0, 1) and masks over both signs."""
    return SamPromptable(build_random_sam(), "random")


@pytest.fixture(scope="session")
def official_sam() -> OfficialSam:
    """`random_sam`, its modules called as they are."""
    return OfficialSam(build_random_sam(), "official")


@pytest.fixture
def make(random_sam) -> Callable[..., Any]:
    """Makes the callback of most tests, with the random SAM, that logs everything.

    Arguments replace its own.
    """
    from lightning_stubs import NUM_CLASSES, REFINE  # loads Lightning

    from lightning_samrefine import SAMRefineCallback

    def build(**kwargs: Any) -> SAMRefineCallback:
        return SAMRefineCallback(
            random_sam, **{"num_classes": NUM_CLASSES, "refine": REFINE, "log": "all", **kwargs}
        )

    return build


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; tests that use it are marked `data`."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("SAMREFINE_DATA", default))
    if not (root / "camvid").is_dir():
        pytest.skip(f"no real data: SAMREFINE_DATA names {root}, which has no folder camvid")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, labels and stored predictions in a folder, for the command."""
    from command_runs import write_folder  # loads Lightning and Hydra

    return write_folder(tmp_path_factory.mktemp("data"))
