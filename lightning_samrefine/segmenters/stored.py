"""A segmenter that returns predictions from disk."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

STORED_KEYS = ("prediction", "probs")


class StoredPredictions(LightningModule):
    """A segmenter whose steps return the prediction stored in the batch.

    Batches are those of `lightning_samrefine.data.FolderDataModule`: ``"prediction"``, label maps
    int64 (B, H, W), or ``"probs"``, float (B, C, H, W) in [0, 1]. There is nothing to train.
    """

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return the stored predictions under their key in the batch.

        Raises:
            MisconfigurationException: The batch has no predictions.
        """
        found = {key: batch[key] for key in STORED_KEYS if key in batch}
        if not found:
            raise MisconfigurationException(
                f"batch must hold {' or '.join(STORED_KEYS)}, got {', '.join(batch)}; set the "
                "folder of predictions, such as data.val.predictions"
            )
        return found

    test_step = validation_step
    predict_step = validation_step
