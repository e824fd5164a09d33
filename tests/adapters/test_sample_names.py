"""Names of images: where they are found, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_samrefine.adapters.sample_names import find_stems, to_stem

IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("batch", "stems"),
    [
        ({"image": IMAGES, "name": ["a.png", "b.jpg"]}, ["a", "b"]),
        ({"image": IMAGES, "Path": ["/data/x/a.tif", Path("/data/y/b.TIFF")]}, ["a", "b"]),
        ({"image": IMAGES, "image_id": torch.tensor([7, 42])}, ["7", "42"]),
        ({"image": IMAGES, "id": ["x", "y"], "name": ["a", "b"]}, ["a", "b"]),
        ({"image": IMAGES, "meta": {"filename": ["s/a.01", "s/b"]}}, ["s/a.01", "s/b"]),
        ([IMAGES, {"stem": ("a", "b")}], ["a", "b"]),
        # None of these names two images, so their numbers in the data set do.
        ({"image": IMAGES, "name": ["a"]}, ["00000005", "00000009"]),
        ({"image": IMAGES, "id": torch.tensor([0.5, 1.5])}, ["00000005", "00000009"]),
        ({"image": IMAGES, "ids": torch.tensor([True, False])}, ["00000005", "00000009"]),
        ([IMAGES, ["a", "b"]], ["00000005", "00000009"]),
        (IMAGES, ["00000005", "00000009"]),
    ],
)
def test_places_of_names(batch, stems):
    assert find_stems(batch, 2, None, [5, 9]) == stems


def test_a_key_is_believed_or_refused():
    batch = {"name": ["a", "b"], "meta": {"uid": ["u/1", "u/2"]}, "one": "x"}
    assert find_stems(batch, 2, "meta.uid") == ["u/1", "u/2"]
    assert find_stems([IMAGES, ["p", "q"]], 2, "1") == ["p", "q"]
    assert find_stems(batch, 1, "one") == ["x"]
    for key in ("meta.nothing", "one", "meta"):
        with pytest.raises(ValueError, match=rf"stem_key must be .*, got '{key}'"):
            find_stems(batch, 2, key, [0, 1])


def test_the_error_without_names_and_numbers_describes_the_batch():
    with pytest.raises(ValueError, match=r"No names found .* The batch is .*'image'"):
        find_stems({"image": IMAGES}, 2, None, [])


@pytest.mark.parametrize("name", ["", ".", "../a", "a/../../b", "a\nb", "a\0b", "a\\b", "\ud800"])
def test_names_that_no_file_below_the_folder_can_have(name):
    with pytest.raises(ValueError, match=r"stem must be .*, got"):
        to_stem(name)


@given(st.text())
def test_whatever_the_text_the_file_lies_below_the_folder(text):
    root = Path("/any/folder")
    try:
        stem = to_stem(text)
    except ValueError:
        return
    path = root / f"{stem}.png"
    assert root in path.parents
    assert ".." not in path.parts
