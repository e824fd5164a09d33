"""Journals and manifest: what is torn, foreign or damaged is left out, and never an error."""

from __future__ import annotations

import pytest
import torch
from fuzzing import SETTINGS, fuzz_config, fuzz_journal, fuzz_manifest, fuzz_run_json
from hypothesis import given, settings
from lightning_stubs import Segmenter

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.predictions.manifest import (
    Contents,
    Journal,
    file_columns,
    holds,
    journal_files,
    journal_line,
    manifest_bytes,
    parse_line,
)
from lightning_samrefine.predictions.provenance import Provenance

pytestmark = pytest.mark.numerical


def row(stem, image="0" * 16, **fields):
    return {
        "stem": stem,
        "image": image,
        "raw": "1" * 16,
        "raw_probs": [0.25, 0.75],
        "height": 4,
        "width": 5,
        "regions": 2,
        "left_out": 0,
        "accepted": 1,
        "pred_iou": [0.25, float("nan")],
        "failed": False,
        **file_columns("labels", b"labels"),
        **file_columns("probs", None),
        **fields,
    }


def journal(folder, generation, rank, *rows):
    journal = Journal(folder, generation, rank)
    for one in rows:
        journal.add(one)
    journal.close()


def load(folder, **kwargs):
    return Contents.load(folder / "manifest.parquet", folder, **kwargs)


def test_lines_round_trip_and_torn_ones_are_nothing():
    line = journal_line(row("ä/1"))
    assert parse_line(line)["stem"] == "ä/1"
    for length in range(len(line)):
        assert parse_line(line[:length]) is None
    assert parse_line(line.replace(b"0.25", b"0.75")) is None


def test_the_last_line_of_an_image_counts_and_rows_are_sorted(tmp_path):
    journal(tmp_path, 0, 1, row("b", height=1), row("é"), row("Z"))
    journal(tmp_path, 1, 0, row("b", height=2))
    contents = load(tmp_path)
    assert contents.rows["stem"].to_pylist() == ["Z", "b", "é"]
    assert contents.find("b")["height"] == 2
    assert contents.find("é")["generation"] == 0
    assert contents.find("a") is contents.find("zz") is contents.find("") is None
    assert load(tmp_path, before=1).find("b")["height"] == 1
    assert [generation for generation, _ in journal_files(tmp_path)] == [0, 1]


def test_a_torn_tail_costs_one_line(tmp_path):
    journal(tmp_path, 0, 0, row("a"), row("b"))
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-7])
    assert load(tmp_path).rows["stem"].to_pylist() == ["a"]


def test_lines_of_another_kind_are_ignored_and_the_others_kept(tmp_path):
    broken = [
        row("x", height="tall"),
        row("x", pred_iou=0.5),
        row("x", labels_bytes=None),
        row(3),
        {"stem": "x"},
        row("x", height=2**40),
    ]
    for index, one in enumerate(broken):
        journal(tmp_path, index, 0, row("a"), one, row("b"))
    assert load(tmp_path).rows["stem"].to_pylist() == ["a", "b"]


def test_one_name_for_two_images_of_a_run_is_noticed(tmp_path):
    journal(tmp_path, 0, 0, row("a", "1"), row("b", "1"), row("c", "1"))
    kept = Journal(tmp_path, 1, 0)
    kept.keep("a", "1")
    kept.close()
    journal(tmp_path, 1, 1, row("a", "2"), row("b", "2"))
    contents = load(tmp_path)
    assert contents.ambiguous(1) == ["a"]
    assert contents.ambiguous(0) == []


def test_the_manifest_reads_back_and_its_bytes_depend_on_the_rows_alone(tmp_path):
    rows = [row(f"{index:03d}") for index in range(50)]
    journal(tmp_path / "one", 0, 0, *rows)
    for index, one in enumerate(reversed(rows)):
        journal(tmp_path / "many", index % 7, index % 3, one)
    contents = [
        manifest_bytes(load(tmp_path / folder).rows, {"sam": "s"}) for folder in ("one", "many")
    ]
    assert contents[0] == contents[1]
    path = tmp_path / "manifest.parquet"
    path.write_bytes(contents[0])
    read = Contents.load(path, tmp_path / "none")
    assert len(read.rows) == 50
    assert read.find("007")["generation"] == -1
    # A bit that flipped in the pages is noticed, or else changes nothing that is read.
    damaged = 0
    for position in range(4, len(contents[0]) - 8, 97):
        flipped = bytearray(contents[0])
        flipped[position] ^= 4
        path.write_bytes(flipped)
        rows_read = Contents.load(path, tmp_path / "none").rows
        assert len(rows_read) == 0 or rows_read.select(["stem", "labels_crc32"]).equals(
            read.rows.select(["stem", "labels_crc32"])
        )
        damaged += len(rows_read) == 0
    assert damaged


def test_files_are_compared_by_size_and_checksum(tmp_path):
    path = tmp_path / "file"
    columns = file_columns("labels", b"content")
    size, checksum = columns["labels_bytes"], columns["labels_crc32"]
    assert not holds(path, size, checksum)
    for content, expected in ((b"content", True), (b"conten", False), (b"Content", False)):
        path.write_bytes(content)
        assert holds(path, size, checksum) == expected


def test_provenance_round_trips_and_lists_differences(random_sam):
    config = RefineConfig(max_regions=7)
    one = Provenance.of(config, random_sam, "float32", random_sam.module, {"mean": (0.5, 1)})
    again = Provenance.parse(one.dumps())
    assert again == one
    assert again.dumps() == one.dumps()
    assert one.differences(again) == []
    other = Provenance.of(RefineConfig(), random_sam, "bfloat16", random_sam.module, {"mean": None})
    assert other.differences(one) == [
        "inputs.mean: [0.5, 1] there, None now",
        "refine.max_regions: 7 there, None now",
        "sam.precision: 'float32' there, 'bfloat16' now",
    ]
    assert one.refine_hash != other.refine_hash
    unknown = Provenance.parse(one.dumps())
    unknown.segmenter["weights"] = "else"
    assert "segmenter.weights" in one.differences(unknown)[0]
    unknown.segmenter["weights"] = None
    assert one.differences(unknown) == []


def test_a_compiled_segmenter_is_the_same_one(random_sam):
    def weights(module):
        return Provenance.of(RefineConfig(), random_sam, "float32", module, {}).segmenter

    module = Segmenter()
    plain = weights(module)
    module.network = torch.compile(module.network, backend="eager")
    assert weights(module) == plain
    with torch.no_grad():
        module.network.bias[0] += 1e-6
    assert weights(module) != plain


def test_weights_that_cannot_be_read_are_not_compared(random_sam):
    module = torch.nn.LazyLinear(3)
    with pytest.warns(RuntimeWarning, match="weights cannot be read"):
        one = Provenance.of(RefineConfig(), random_sam, "float32", module, {})
    assert one.segmenter["weights"] is None


@pytest.mark.parametrize("fuzz", [fuzz_journal, fuzz_manifest, fuzz_run_json, fuzz_config])
def test_fuzz_briefly(fuzz, tmp_path):
    strategy, check = fuzz(tmp_path)
    settings(SETTINGS, max_examples=60)(given(strategy)(check))()
