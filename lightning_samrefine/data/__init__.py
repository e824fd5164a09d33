"""Data modules with batches in the format of the callback and the bundled segmenters.

A sample is a dict: ``"image"`` uint8 (3, H, W) RGB, ``"mask"`` int64 (H, W), ``"name"`` str, from
folders ``"folder"`` str, the image's sub-folder, and with stored predictions ``"prediction"`` int64
(H, W) or ``"probs"`` float32 (C, H, W).
"""

from lightning_samrefine.data.folder import FolderDataModule, FolderDataset
from lightning_samrefine.data.folder_files import FolderSplit
from lightning_samrefine.data.torchvision_sets import TorchvisionDataModule

__all__ = ["FolderDataModule", "FolderDataset", "FolderSplit", "TorchvisionDataModule"]
