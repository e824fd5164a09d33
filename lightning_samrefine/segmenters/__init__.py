"""LightningModules that come with the `samrefine` command."""

from lightning_samrefine.segmenters.stored import StoredPredictions
from lightning_samrefine.segmenters.torchvision_model import TorchvisionSegmenter

__all__ = ["StoredPredictions", "TorchvisionSegmenter"]
