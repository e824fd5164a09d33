"""The list of what a folder of predictions holds: journals that become one Parquet file.

While a run writes, each of its processes appends a line to a journal of its own for every image
whose files are complete. At the end the journals become ``manifest.parquet``, which does not
depend on the number of processes, nor on how often they were killed.

Journals, and not one Parquet file a process, because a Parquet file is unreadable before its footer
is written: a kill would lose every row of its process; a journal loses the line it tore.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = dict[str, Any]

# One row an image: its name (a relative path), what it was made from (see `Fingerprint`), its size;
# how many regions were prompted, left out by max_regions, and accepted, and SAM's predicted IoU of
# each prompted one; whether refining failed, and the files hold the raw prediction; what the files
# hold.
SCHEMA = pa.schema(
    [
        pa.field("stem", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
        pa.field("raw_probs", pa.list_(pa.float64()), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("regions", pa.int32(), nullable=False),
        pa.field("left_out", pa.int32(), nullable=False),
        pa.field("accepted", pa.int32(), nullable=False),
        pa.field("pred_iou", pa.list_(pa.float32()), nullable=False),
        pa.field("failed", pa.bool_(), nullable=False),
        pa.field("labels_bytes", pa.int64(), nullable=False),
        pa.field("labels_crc32", pa.uint32(), nullable=False),
        pa.field("probs_bytes", pa.int64()),
        pa.field("probs_crc32", pa.uint32()),
    ]
)
_GENERATION = pa.field("generation", pa.int32(), nullable=False)
_WITH_GENERATION = SCHEMA.append(_GENERATION)
_SEEN = pa.schema([SCHEMA.field("stem"), SCHEMA.field("image"), _GENERATION])

_JOURNAL_NAME = re.compile(r"(\d{1,9})-(\d{1,9})\.jsonl")
_LINES_AT_ONCE = 20_000


class Journal:
    """Lines that are complete or ignored, one an image, appended by one process.

    Args:
        folder: Of all journals.
        generation: Number of the run, above that of all runs before.
        rank: Number of the process.
    """

    def __init__(self, folder: Path, generation: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / journal_name(generation, rank)).open("ab")

    def add(self, row: Mapping[str, Any]) -> None:
        """Note an image whose files are complete: a row of `SCHEMA`."""
        self._file.write(journal_line(row))
        self._file.flush()

    def keep(self, stem: str, image: str) -> None:
        """Note an image whose files an earlier run completed."""
        self.add({"stem": stem, "image": image})

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def file_columns(name: str, content: bytes | None) -> Row:
    """Return the size and checksum columns of the file of ``labels`` or ``probs``.

    Args:
        name: The file's kind.
        content: The file's bytes, None without a file.
    """
    if content is None:
        return {f"{name}_bytes": None, f"{name}_crc32": None}
    return {f"{name}_bytes": len(content), f"{name}_crc32": zlib.crc32(content)}


def holds(path: Path, nbytes: int, crc32: int) -> bool:
    """Whether a file exists with the size and checksum of `file_columns`."""
    try:
        return path.stat().st_size == nbytes and zlib.crc32(path.read_bytes()) == crc32
    except OSError:
        return False


def journal_line(row: Mapping[str, Any]) -> bytes:
    """Return a line with a checksum of its own, by which a torn line is recognized."""
    text = json.dumps(row, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse_line(line: bytes) -> Row | None:
    """Read a line of `journal_line`; None for a torn or any other line."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"stem", "image"} <= row.keys() else None


class JournalFollower:
    """Reads the lines that the other processes of a run append to their journals.

    Args:
        folder: Of all journals.
        generation: Number of the run.
        rank: Number of the process, whose own journal is left out.
    """

    def __init__(self, folder: Path, generation: int, rank: int) -> None:
        self._folder, self._generation = folder, generation
        self._own = journal_name(generation, rank)
        self._read: dict[Path, int] = {}

    def new_rows(self) -> Iterator[Row]:
        """Return the rows appended since the last call.

        Raises:
            OSError: A journal could not be read.
        """
        for generation, path in journal_files(self._folder):
            if generation != self._generation or path.name == self._own:
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the rest of it comes later
                    self._read[path] = self._read.get(path, 0) + len(line)
                    if (row := parse_line(line)) is not None:
                        yield row


@dataclass(frozen=True)
class Contents:
    """The rows of a folder's manifest and journals.

    Attributes:
        rows: Columns of `SCHEMA` and ``generation``, sorted by stem: each image's last entry.
        seen: ``stem``, ``image`` and ``generation`` of every line, in no order.
    """

    rows: pa.Table
    seen: pa.Table
    _stems: pa.Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stems", self.rows["stem"].combine_chunks())

    @classmethod
    def load(cls, manifest: Path, journals: Path, before: int | None = None) -> Contents:
        """Read a manifest and the journals after it; missing or damaged parts are left out.

        Args:
            manifest: The Parquet file, generation −1.
            journals: Their folder.
            before: Journals of this generation and later ones are left out.
        """
        rows, seen = [_read_manifest(manifest)], [_SEEN.empty_table()]
        for generation, path in journal_files(journals):
            if before is None or generation < before:
                for chunk in _chunks(path):
                    rows.append(_to_table(chunk, _WITH_GENERATION, generation))
                    seen.append(_to_table(chunk, _SEEN, generation))
        return cls(_last_of_each(pa.concat_tables(rows)), pa.concat_tables(seen))

    def find(self, stem: str) -> Row | None:
        """Return an image's row, or None."""
        stems = self._stems
        # UTF-8 sorts as code points do.
        index = bisect.bisect_left(range(len(stems)), stem, key=lambda i: stems[i].as_py())
        if index == len(stems) or stems[index].as_py() != stem:
            return None
        return self.rows.slice(index, 1).to_pylist()[0]

    def ambiguous(self, generation: int) -> list[str]:
        """Return the stems of several images within one run."""
        run = self.seen.filter(pc.equal(self.seen["generation"], generation))
        images = run.group_by("stem").aggregate([("image", "count_distinct")])
        several = images.filter(pc.greater(images["image_count_distinct"], 1))
        return sorted(several["stem"].to_pylist())


def journal_name(generation: int, rank: int) -> str:
    """Return the name of a process's journal."""
    return f"{generation:04d}-{rank:05d}.jsonl"


def journal_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the generation and path of each journal, older generations first."""
    if not folder.is_dir():
        return []
    named = [(_JOURNAL_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [
        (generation, path)
        for generation, _, path in sorted(
            (int(match[1]), int(match[2]), path) for match, path in named if match
        )
    ]


def manifest_bytes(rows: pa.Table, constants: Mapping[str, str]) -> bytes:
    """Return the Parquet file: equal rows and constants give equal bytes.

    Args:
        rows: Of `SCHEMA`, sorted.
        constants: Columns with one and the same value in every row.
    """
    table = rows.select(SCHEMA.names).combine_chunks()
    for name, value in constants.items():
        column = pa.array([value], pa.string()).dictionary_encode()
        indices = pa.repeat(pa.scalar(0, pa.int32()), len(table))
        table = table.append_column(
            name, pa.DictionaryArray.from_arrays(indices, column.dictionary)
        )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _read_manifest(path: Path) -> pa.Table:
    try:
        table = pq.read_table(
            path, columns=SCHEMA.names, page_checksum_verification=True, partitioning=None
        )
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return _WITH_GENERATION.empty_table()
    generation = pa.repeat(pa.scalar(-1, pa.int32()), len(table))
    return table.append_column(_GENERATION, generation)


def _chunks(path: Path) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    with path.open("rb") as file:
        for line in file:
            if (row := parse_line(line)) is not None:
                chunk.append(row)
            if len(chunk) == _LINES_AT_ONCE:
                yield chunk
                chunk = []
    yield chunk


def _to_table(lines: Sequence[Row], schema: pa.Schema, generation: int) -> pa.Table:
    """Convert the lines that hold all of a schema's columns; those of another kind are ignored."""
    wanted = set(schema.names) - {_GENERATION.name}
    rows = [{**line, _GENERATION.name: generation} for line in lines if wanted <= line.keys()]
    try:
        return _strict_table(rows, schema)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        if len(rows) <= 1:
            return schema.empty_table()
    return pa.concat_tables([_to_table([row], schema, generation) for row in rows])


def _strict_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema)
    table.validate(full=True)
    if any(table[column.name].null_count for column in schema if not column.nullable):
        raise ValueError("a column without a value")
    return table


def _last_of_each(rows: pa.Table) -> pa.Table:
    """Sort by stem, and keep the last of equal ones."""
    order = pa.array(range(len(rows)), pa.int64())
    rows = rows.append_column("order", order).sort_by(
        [("stem", "ascending"), ("order", "ascending")]
    )
    rows = rows.drop_columns(["order"]).combine_chunks()
    if len(rows) < 2:
        return rows
    stems = rows["stem"].combine_chunks()
    last = pc.not_equal(stems.slice(0, len(stems) - 1), stems.slice(1))
    return rows.filter(pa.concat_arrays([last, pa.array([True])])).combine_chunks()
