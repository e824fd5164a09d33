"""Every benchmark can be imported: what it takes from the package is still there."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = sorted(
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_imported(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "lightning_samrefine"):
            raise
        pytest.skip(f"{name} needs {error.name}")


def test_there_are_benchmarks():
    assert "benchmarks.speed" in MODULES
    assert "benchmarks.domains.run" in MODULES
