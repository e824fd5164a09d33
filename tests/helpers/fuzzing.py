"""Fuzzes what is read from files and command lines.

    python tests/fuzzing.py SECONDS

Each function below returns a strategy and a check; the check fails where a parser does anything
but accept, ignore or refuse in its own words. Prints one JSON object: inputs tried by target.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lightning_samrefine.callbacks.arguments import parse_refine
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.predictions.manifest import (
    SCHEMA,
    Contents,
    file_columns,
    journal_line,
    manifest_bytes,
    parse_line,
)
from lightning_samrefine.predictions.provenance import FORMAT, Provenance

SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

Fuzz = tuple[st.SearchStrategy[Any], Callable[[Any], None]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
fields = st.sampled_from(SCHEMA.names)
good_rows = st.builds(
    lambda stem, ious: {
        "stem": stem, "image": "00", "raw": "01", "raw_probs": [0.5], "height": 1, "width": 2,
        "regions": len(ious), "left_out": 0, "accepted": 0, "pred_iou": ious, "failed": False,
        **file_columns("labels", b"x"), **file_columns("probs", None),
    },
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.lists(st.floats(width=32), max_size=3),
)  # fmt: skip
wrong_rows = st.builds(
    lambda row, wrong: {**row, **wrong},
    good_rows,
    st.dictionaries(fields, json_values, max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn, content: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that were right before something was cut out, put in or flipped."""
    data = bytearray(draw(content))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "insert"]))
        if kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif at < len(data):
            data[at] ^= draw(st.integers(1, 255))
    return bytes(data)


def fuzz_journal(folder: Path) -> Fuzz:
    """Whole lines come back, whatever stands around them; nothing raises."""
    journals = folder / "journals"
    journals.mkdir(parents=True, exist_ok=True)
    lines = st.lists(
        (good_rows | wrong_rows).map(journal_line)
        | json_values.map(lambda value: journal_line(value))
        | damaged(good_rows.map(journal_line))
        | st.binary(max_size=60),
        max_size=6,
    )

    def check(written: list[bytes]) -> None:
        content = b"".join(written)
        (journals / "0000-00000.jsonl").write_bytes(content)
        contents = Contents.load(folder / "none.parquet", journals)
        lines = [row for line in content.splitlines(True) if (row := parse_line(line))]
        stems = {row["stem"] for row in lines if isinstance(row["stem"], str)}
        found = contents.rows["stem"].to_pylist()
        assert found == sorted(set(found))
        assert set(found) <= stems
        for stem in found:
            row = contents.find(stem)
            assert row is not None
            assert isinstance(row["labels_bytes"], int)

    return lines, check


def fuzz_manifest(folder: Path) -> Fuzz:
    """A damaged Parquet file is no file, or still has what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.parquet"

    def parquet(rows: list[dict[str, Any]]) -> bytes:
        journals = folder / "source"
        journals.mkdir(exist_ok=True)
        (journals / "0000-00000.jsonl").write_bytes(b"".join(map(journal_line, rows)))
        return manifest_bytes(Contents.load(folder / "none", journals).rows, {"sam": "s"})

    whole = st.lists(good_rows, max_size=5).map(parquet)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        rows = Contents.load(path, folder / "none").rows
        assert rows.schema.names == [*SCHEMA.names, "generation"]
        rows.to_pylist()

    return damaged(whole) | whole | st.binary(max_size=200), check


def fuzz_run_json(folder: Path) -> Fuzz:
    """run.json is read, or refused with a ValueError."""
    parts = ("refine", "sam", "segmenter", "inputs")
    objects = st.fixed_dictionaries(
        {"format": st.just(FORMAT)},
        optional={part: st.dictionaries(st.text(max_size=5), json_values) for part in parts},
    )
    texts = (objects | json_values).map(lambda value: json.dumps(value).encode())

    def check(content: bytes) -> None:
        try:
            found = Provenance.parse(content)
        except ValueError:
            return
        again = Provenance.parse(found.dumps())
        # NaN differs from itself, as it should.
        assert again.differences(found) == [] or b"NaN" in content
        assert len(found.refine_hash) == 16

    nested = st.integers(1, 100_000).map(lambda depth: b"[" * depth)
    return damaged(texts) | st.binary(max_size=80) | nested, check


def fuzz_config(folder: Path) -> Fuzz:
    """Thresholds are in range, or refused with a TypeError or a ValueError that names them."""
    names = st.sampled_from([*asdict(RefineConfig()), "preset"]) | st.text(max_size=9)
    numbers = st.sampled_from([0, 0.5, 1, 2, -1, 1e400, 10**400, "default", True])
    refine = st.dictionaries(names, numbers | json_values, max_size=4) | json_values

    def check(given_refine: Any) -> None:
        try:
            config = parse_refine(given_refine)
        except (TypeError, ValueError) as error:
            if not any(word in str(error) for word in ("must", "accepted", "has no field")):
                raise
            return
        assert 0 <= config.score_thresh < 1
        assert 0 < config.mask_prompt_scale < float("inf")
        assert 0 <= config.pred_iou_thresh <= 1
        assert min(config.stride, config.min_region_area) >= 1
        for bound in (config.max_regions, config.max_prompts_per_batch):
            assert bound is None or bound >= 1
        assert RefineConfig(**asdict(config)) == config

    return refine, check


TARGETS = {
    "journals": fuzz_journal,
    "manifest.parquet": fuzz_manifest,
    "run.json": fuzz_run_json,
    "thresholds": fuzz_config,
}


def counting(
    check: Callable[[Any], None], tried: dict[str, int], name: str
) -> Callable[[Any], None]:
    """Return a check that counts its calls."""

    def counted(value: Any) -> None:
        tried[name] += 1
        check(value)

    return counted


def main() -> None:
    seconds = float(sys.argv[1])
    tried = dict.fromkeys(TARGETS, 0)
    end, round_number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            round_number += 1
            for name, fuzz in TARGETS.items():
                strategy, check = fuzz(Path(folder) / name)
                counted = counting(check, tried, name)
                phases = (Phase.generate, Phase.shrink)
                one_round = settings(SETTINGS, max_examples=300, phases=phases)
                seed(round_number)(one_round(given(strategy)(counted)))()
    print(json.dumps(tried))


if __name__ == "__main__":
    main()
