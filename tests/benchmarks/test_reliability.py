"""Memory stays where it is, however many images are predicted; the page is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import reliability


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_does_not_grow_with_the_images(tmp_path):
    # benchmarks/RELIABILITY.md has it over 5,000 images.
    figures = reliability.predict_many(240, every=20, folder=str(tmp_path / "out"))
    assert figures["written"] == 240
    assert figures["growth"] < 0.03


def test_the_page_shows_what_was_counted():
    assert reliability.PAGE.read_text() == reliability.page(reliability.stored())
