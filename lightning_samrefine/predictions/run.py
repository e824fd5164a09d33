"""One process's share of a prediction run: skips images that are done, and writes the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.predictions.encoding import (
    ProbsKind,
    label_png,
    probs_safetensors,
    storable_labels,
    storable_probs,
)
from lightning_samrefine.predictions.fingerprints import Fingerprint
from lightning_samrefine.predictions.store import OutputFolder, Spellings
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.background_writer import BackgroundWriter

# Interval at which a process reads the others' journals.
_LOOK_SECONDS = 1.0


@dataclass
class PredictCounts:
    """Counts of one process's images in a run.

    Attributes:
        written: Images whose files were written.
        redone: Images among the written that an earlier run had written: another image or raw
            prediction, a refining that had failed, or damaged files.
        kept: Images whose files an earlier run had completed.
        failed: Images among the written whose refining failed: the files hold the raw prediction.
        unread: Images of batches that could not be read: there are no files for them.
    """

    written: int = 0
    redone: int = 0
    kept: int = 0
    failed: int = 0
    unread: int = 0


class PredictionRun:
    """Writes images that are not done into a folder, and notes each once its files are complete.

    Args:
        files: The folder, prepared for this run.
        generation: The run's number, see `OutputFolder.prepare`.
        rank: The process's number.
        probs: Which probabilities are written; None for none.
        queue_size: Maximum number of images waiting to be written.
        counts: Kept up to date.
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
        self._others = files.follow(generation, rank)
        self._looked = time.monotonic()
        # By name: image and raw labels that this process has met, images of other processes.
        self._met: dict[str, tuple[str, str]] = {}
        self._met_elsewhere: dict[str, str] = {}
        self._spellings = Spellings(files)
        self._background = BackgroundWriter(queue_size)

    def is_done(self, stem: str, found: Fingerprint) -> bool:
        """Whether an image's files are there already; of an earlier run's, note that they stay.

        Args:
            stem: The image's name.
            found: Of the image and its raw prediction.

        Raises:
            ValueError: The name means another image or prediction elsewhere in this run, or no
                file can have it.
            OSError: The journal of another process could not be read.
        """
        if self._has_met(stem, found):
            return True
        row = self._contents.find(stem)
        done = (
            row is not None
            and found.matches(row)
            and not row["failed"]  # it may have been a matter of memory
            and self._files.is_whole(row)
        )
        if done:
            self._journal.keep(stem, found.image)
            self._counts.kept += 1
        return done

    def write(
        self,
        stem: str,
        found: Fingerprint,
        inputs: RefineInputs,
        index: int,
        refinement: Refinement | None,
    ) -> None:
        """Hand the files of one image to the thread that writes, once there is room in its queue.

        Args:
            stem: The image's name.
            found: Of the image and its raw prediction.
            inputs: Samples with raw labels and probabilities.
            index: The image's place among them.
            refinement: None if refining failed, and the raw prediction is written.

        Raises:
            Exception: What writing an earlier image raised.
        """
        raw_labels, raw_probs = inputs.labels[index], inputs.probs[index]
        labels = storable_labels(
            raw_labels if refinement is None else refinement.labels, len(raw_probs)
        )
        probs = None
        if self._probs is not None:
            full = raw_probs if refinement is None else refinement.probs
            assert full is not None  # wanted, for they are written
            probs = storable_probs(full, self._probs)
        row = _row(stem, found, labels.shape, refinement)
        self._counts.written += 1
        self._counts.redone += self._contents.find(stem) is not None
        self._counts.failed += row["failed"]
        files, journal = self._files, self._journal

        def write() -> None:
            stored_probs = None if probs is None else probs_safetensors(probs)
            journal.add(files.write_prediction(row, label_png(labels), stored_probs))

        self._background.put(write)

    def close(self) -> None:
        """Write the images in the queue, and flush the journal to the disk.

        Raises:
            Exception: What writing an image raised, or `look_at_others`.
        """
        try:
            self._background.close()
            self.look_at_others()
        finally:
            self._journal.close()

    def look_at_others(self) -> None:
        """Compare names with those of the run's other processes since the last call.

        Raises:
            ValueError: A name means another image there.
            OSError: The journal of another process could not be read.
        """
        self._looked = time.monotonic()
        for row in self._others.new_rows():
            stem, image = row["stem"], row["image"]
            if not isinstance(stem, str) or not isinstance(image, str):
                continue
            self._spellings.check(stem)
            if self._met_elsewhere.setdefault(stem, image) != image:
                raise _clash(stem, "images")
            if stem in self._met and self._met[stem][0] != image:
                raise _clash(stem, "images")

    def _has_met(self, stem: str, found: Fingerprint) -> bool:
        """Whether this process has met an image before; a name must not mean two things."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self.look_at_others()
        known = self._met.get(stem)
        images = {found.image, self._met_elsewhere.get(stem, found.image)}
        if len(images | ({known[0]} if known else set())) > 1:
            self._journal.keep(stem, found.image)  # so that the other process learns of it
            raise _clash(stem, "images")
        if known is not None and known[1] != found.raw:
            raise _clash(stem, "predictions")
        self._spellings.check(stem)
        self._files.check_stem(stem, self._probs is not None)
        self._met[stem] = (found.image, found.raw)
        return known is not None


def _clash(stem: str, things: str) -> ValueError:
    return ValueError(
        f"stem must differ between images, without the suffix of an image file as well, got "
        f"{stem!r} for two different {things}: set stem_key to where the batch has other names"
    )


def _row(
    stem: str, found: Fingerprint, image_hw: Sequence[int], refinement: Refinement | None
) -> dict[str, Any]:
    """Return an image's row of the manifest, but for its files."""
    regions = None if refinement is None else refinement.regions
    return {
        "stem": stem,
        **found.columns(),
        "height": image_hw[0],
        "width": image_hw[1],
        "regions": 0 if regions is None else len(regions),
        "left_out": 0 if regions is None else regions.left_out,
        "accepted": 0 if regions is None else int(regions.accepted.sum()),
        "pred_iou": [] if regions is None else regions.pred_iou.tolist(),
        "failed": regions is None,
    }
