"""A folder of predictions that is valid at any moment, and that a later run may complete.

labels/STEM.png           label maps
probs/STEM.safetensors    probabilities, if they are wanted
manifest.parquet          what is there, after a complete run
run.json                  what it was made with
.journal/, .partial/      while a run writes: what is complete, and what is not
.locks/                   while a run writes: they keep a second one out
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ModuleNotFoundError as error:  # here, where the writer needs it first
    raise ModuleNotFoundError(
        "SAMRefineWriter: its manifest needs pyarrow, which is not installed; "
        'pip install "lightning-samrefine[predict]"'
    ) from error

from lightning_samrefine.predictions.manifest import (
    Contents,
    Journal,
    JournalFollower,
    Row,
    file_columns,
    holds,
    journal_files,
    manifest_bytes,
)
from lightning_samrefine.predictions.provenance import Provenance

_SHOWN = 5


@dataclass(frozen=True)
class Finished:
    """Counts of a finished run.

    Attributes:
        rows: The manifest's.
        written: Images of this run, on all its processes, whose files were not there before.
        redone: Images whose files were written again: another image or raw prediction, a refining
            that had failed, or damaged files.
        kept: Images whose files stayed as they were.
    """

    rows: pa.Table
    written: int
    redone: int
    kept: int


class Spellings:
    """Refuses names that differ only in case if the file system keeps one of such files.

    Args:
        files: The folder that they are for.
    """

    def __init__(self, files: OutputFolder) -> None:
        self._folds = files.folds_case()
        self._known: dict[str, str] = {}

    def check(self, stem: str) -> None:
        """Compare a name with those before it.

        Raises:
            ValueError: It differs from one only in case.
        """
        if not self._folds:
            return
        first = self._known.setdefault(stem.casefold(), stem)
        if first != stem:
            raise ValueError(
                "stem must differ from others by more than case on the file system of this folder, "
                f"got {first!r} and {stem!r}: rename one, or write to another file system"
            )


class OutputFolder:
    """The files of a folder: reads, checks and writes them.

    Args:
        path: The folder; several processes may share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "manifest.parquet"
        self._run, self._journals, self._partial = (
            path / "run.json",
            path / ".journal",
            path / ".partial",
        )
        self.locks = path / ".locks"

    def labels(self, stem: str) -> Path:
        """Return the path of an image's label map."""
        return self.path / "labels" / f"{stem}.png"

    def probs(self, stem: str) -> Path:
        """Return the path of an image's probabilities."""
        return self.path / "probs" / f"{stem}.safetensors"

    def check(self) -> None:
        """Refuse a folder with other content.

        Raises:
            ValueError: A file, or a folder that is neither empty nor of an earlier run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder must be a folder, got the file {self.path}")
        if self.path.is_dir() and not self._run.exists():
            found = sorted(
                p.name for p in self.path.iterdir() if p not in (self._partial, self.locks)
            )
            if found:
                raise ValueError(
                    "folder must be new, empty or of an earlier run, got "
                    f"{self.path}, which holds {', '.join(found[:_SHOWN])} and no run.json"
                )

    def prepare(self, provenance: Provenance, overwrite: bool) -> int:
        """Prepare the folder for a run; one process does this before any file is written.

        Args:
            provenance: Of the run.
            overwrite: Whether to remove what a run of another provenance has written.

        Returns the run's generation, above those of all journals.

        Raises:
            ValueError: The folder has other content, or results of another provenance.
        """
        self.check()
        differences = self._differences(provenance)
        if differences and not overwrite:
            raise ValueError(
                "folder must be of a run with the same settings, got "
                f"{self.path}, which an earlier run wrote with others "
                f"({'; '.join(differences)}): take another folder, the same settings, or "
                "overwrite=True, which removes those results"
            )
        if differences:
            self._clear()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True, exist_ok=True)
        if not self._run.exists():
            self.write(self._run, provenance.dumps().encode())
        return 1 + max((generation for generation, _ in journal_files(self._journals)), default=-1)

    def contents(self, before: int | None = None) -> Contents:
        """Read the manifest and the journals of generations below ``before``."""
        return Contents.load(self.manifest, self._journals, before)

    def journal(self, generation: int, rank: int) -> Journal:
        """Open a process's journal."""
        return Journal(self._journals, generation, rank)

    def follow(self, generation: int, rank: int) -> JournalFollower:
        """Follow the journals of a run's other processes."""
        return JournalFollower(self._journals, generation, rank)

    def check_stem(self, stem: str, with_probs: bool) -> None:
        """Refuse a name that the file system cannot take; the folder exists.

        Args:
            stem: An image's name.
            with_probs: Whether probabilities are written as well.

        Raises:
            ValueError: The name or one of its parts is too long.
        """
        paths = [self.labels(stem), *([self.probs(stem)] if with_probs else [])]
        for path in paths:
            # Part by part: of a path below folders that are not there nothing is checked.
            parts = PurePosixPath(path.relative_to(self.path).as_posix()).parts
            for probe in (*(self.path / part for part in parts), path):
                try:
                    os.lstat(probe)
                except OSError as error:
                    if error.errno == errno.ENAMETOOLONG:
                        raise ValueError(
                            f"stem must be shorter, got {stem!r}: the file system refuses "
                            f"{probe.name} ({error.strerror})"
                        ) from error

    def folds_case(self) -> bool:
        """Whether the file system takes names that differ only in case for one.

        Raises:
            OSError: The folder cannot be written.
        """
        self._partial.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="Case", dir=self._partial) as file:
            probe = Path(file.name)
            return probe.with_name(probe.name.swapcase()).exists()

    def write(self, path: Path, content: bytes) -> None:
        """Write a file atomically, replacing an older one.

        Raises:
            OSError: It could not be written.
        """
        temporary = self._partial / uuid.uuid4().hex
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def write_prediction(self, row: Row, labels: bytes, probs: bytes | None) -> Row:
        """Write an image's PNG and, if given, safetensors; return its row with their columns.

        Raises:
            OSError: A file could not be written.
        """
        self.write(self.labels(row["stem"]), labels)
        if probs is not None:
            self.write(self.probs(row["stem"]), probs)
        return {**row, **file_columns("labels", labels), **file_columns("probs", probs)}

    def is_whole(self, row: Row) -> bool:
        """Whether an image's files exist with the size and checksum of its row."""
        return all(holds(path, size, checksum) for path, size, checksum in self._files(row))

    def finish(self, generation: int, constants: Mapping[str, str]) -> Finished:
        """Turn the journals into the manifest; one process does this after all have written.

        Args:
            generation: Of the run that ends.
            constants: Columns with one and the same value in every row.

        Raises:
            ValueError: One name meant different images: one of them is lost.
            OSError: The manifest could not be written.
        """
        contents = self.contents()
        ambiguous = contents.ambiguous(generation)
        if ambiguous:
            raise ValueError(
                f"stem must differ between images, got {len(ambiguous)} names of several images "
                f"({', '.join(ambiguous[:_SHOWN])}), and only one file was kept for each name: set "
                "stem_key to where the batch has different ones. There is no manifest"
            )
        met = contents.seen.filter(pc.equal(contents.seen["generation"], generation))["stem"]
        met = pc.unique(met)
        is_met = pc.is_in(contents.rows["stem"], met)
        # Images that this run did not read, of a larger data set for example, stay listed.
        others = contents.rows.filter(pc.invert(is_met)).to_pylist()
        gone = pa.array([row["stem"] for row in others if not self.is_whole(row)], pa.string())
        rows = contents.rows.filter(pc.invert(pc.is_in(contents.rows["stem"], gone)))
        written = contents.rows.filter(pc.equal(contents.rows["generation"], generation))["stem"]
        before = self.contents(before=generation).rows["stem"].combine_chunks()
        redone = pc.sum(pc.is_in(written, before)).as_py() or 0
        self.write(self.manifest, manifest_bytes(rows, constants))
        _sync(self.path)
        shutil.rmtree(self._journals, ignore_errors=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        return Finished(rows, len(written) - redone, redone, len(met) - len(written))

    def _files(self, row: Row) -> Iterator[tuple[Path, int, int]]:
        yield self.labels(row["stem"]), row["labels_bytes"], row["labels_crc32"]
        if row["probs_bytes"] is not None:
            yield self.probs(row["stem"]), row["probs_bytes"], row["probs_crc32"]

    def _differences(self, provenance: Provenance) -> list[str]:
        if not self._run.exists():
            return []
        try:
            return provenance.differences(Provenance.parse(self._run.read_bytes()))
        except (ValueError, OSError) as error:
            return [f"{self._run.name} cannot be read: {error}"]

    def _clear(self) -> None:
        """Remove the results; run.json goes last, because it has their settings."""
        for folder in (self._journals, self.path / "labels", self.path / "probs"):
            shutil.rmtree(folder, ignore_errors=True)
        self.manifest.unlink(missing_ok=True)
        self._run.unlink()


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
