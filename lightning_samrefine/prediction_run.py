"""One process's share of a prediction run: which images are done, and the writing of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_samrefine.adapter import RefineInputs
from lightning_samrefine.background import BackgroundWriter
from lightning_samrefine.output_folder import OutputFolder
from lightning_samrefine.prediction_files import (
    ProbsKind,
    label_png,
    probs_safetensors,
    storable_labels,
    storable_probs,
)
from lightning_samrefine.refinement import Refinement


@dataclass
class PredictCounts:
    """What one process did with its images in a run.

    Attributes:
        written: Images whose files were written.
        kept: Images whose files an earlier run had completed.
        failed: Images among the written whose refining failed: the files hold the raw prediction.
        unread: Images of batches that could not be read: there are no files for them.
    """

    written: int = 0
    kept: int = 0
    failed: int = 0
    unread: int = 0


class PredictionRun:
    """Writes images that are not done into a folder, each noted once its files are whole.

    Args:
        files: The folder, prepared for this run.
        generation: The run's number, see `OutputFolder.prepare`.
        rank: The process's number.
        probs: Which probabilities are written; None for none.
        queue_size: How many images may wait to be written.
        counts: Is kept up to date.
    """

    def __init__(
        self,
        files: OutputFolder,
        generation: int,
        rank: int,
        probs: ProbsKind | None,
        queue_size: int,
        counts: PredictCounts,
    ) -> None:
        self._files = files
        self._probs: ProbsKind | None = probs
        self._counts = counts
        self._contents = files.contents(before=generation)
        self._journal = files.journal(generation, rank)
        self._background = BackgroundWriter(queue_size)

    def is_done(self, stem: str, image: str) -> bool:
        """Whether an earlier run completed an image's files; if so, note that they stay.

        Args:
            stem: The image's name.
            image: Its `image_hash`.
        """
        row = self._contents.find(stem)
        done = (
            row is not None
            and row["image"] == image
            and not row["failed"]  # it may have been a matter of memory
            and self._files.is_whole(row)
        )
        if done:
            self._journal.keep(stem, image)
            self._counts.kept += 1
        return done

    def write(
        self,
        stem: str,
        image: str,
        inputs: RefineInputs,
        index: int,
        refinement: Refinement | None,
    ) -> None:
        """Hand the files of one image to the thread that writes, once there is room in its queue.

        Args:
            stem: The image's name.
            image: Its `image_hash`.
            inputs: Samples with raw labels and probabilities.
            index: The image's place among them.
            refinement: None where refining failed, and the raw prediction is written.

        Raises:
            Exception: What writing an earlier image raised.
        """
        raw_labels, raw_probs = inputs.labels[index], inputs.probs[index]
        labels = storable_labels(
            raw_labels if refinement is None else refinement.labels, len(raw_probs)
        )
        probs = None
        if self._probs is not None:
            full = raw_probs if refinement is None else refinement.completed_probs(raw_probs)
            probs = storable_probs(full, self._probs)
        row = _row(stem, image, labels.shape, refinement)
        self._counts.written += 1
        self._counts.failed += row["failed"]
        files, journal = self._files, self._journal

        def write() -> None:
            stored_probs = None if probs is None else probs_safetensors(probs)
            journal.add(files.write_prediction(row, label_png(labels), stored_probs))

        self._background.put(write)

    def close(self) -> None:
        """Write what waits to be written, and bring the journal to the disk.

        Raises:
            Exception: What writing an image raised.
        """
        try:
            self._background.close()
        finally:
            self._journal.close()


def image_hash(image: Tensor) -> str:
    """Return 16 hexadecimal digits of an image's size and pixels.

    Args:
        image: (3, H, W) uint8 on any device.
    """
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=8)
    digest.update(memoryview(image.contiguous().cpu().numpy().reshape(-1)))
    return digest.hexdigest()


def _row(
    stem: str, image: str, image_hw: Sequence[int], refinement: Refinement | None
) -> dict[str, Any]:
    """Return an image's row of the manifest, but for its files."""
    regions = None if refinement is None else refinement.regions
    return {
        "stem": stem,
        "image": image,
        "height": image_hw[0],
        "width": image_hw[1],
        "regions": 0 if regions is None else len(regions),
        "left_out": 0 if regions is None else regions.left_out,
        "accepted": 0 if regions is None else int(regions.accepted.sum()),
        "pred_iou": [] if regions is None else regions.pred_iou.tolist(),
        "failed": regions is None,
    }
