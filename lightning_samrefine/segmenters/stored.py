"""Predictions from disk in the place of a network."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

STORED_KEYS = ("prediction", "probs")


class StoredPredictions(LightningModule):
    """A segmenter whose steps return the prediction that the batch brought along.

    Batches are those of `lightning_samrefine.data.FolderDataModule`: ``"prediction"``, label maps
    int64 (B, H, W), or ``"probs"``, float (B, C, H, W) in [0, 1]. There is nothing to train.
    """

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return the stored predictions under the key of the batch.

        Raises:
            MisconfigurationException: The batch has none.
        """
        return self._stored(batch)

    def test_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Do as `validation_step`."""
        return self._stored(batch)

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Do as `validation_step`."""
        return self._stored(batch)

    @staticmethod
    def _stored(batch: dict[str, Any]) -> dict[str, Tensor]:
        found = {key: batch[key] for key in STORED_KEYS if key in batch}
        if not found:
            raise MisconfigurationException(
                "StoredPredictions: the batch holds no stored prediction, only "
                f"{', '.join(batch)}; set the folder of predictions, such as data.val.predictions"
            )
        return found
