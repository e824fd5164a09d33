"""What importing loads: no backend with the package, no transformers model before it is needed."""

import subprocess
import sys

import pytest

LOADED = """
import sys
{statement}
print(*sys.modules)
"""


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", LOADED.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_alone_loads_no_backend_nor_torch():
    names = loaded_by("import lightning_samrefine")
    assert "lightning_samrefine" in names
    heavy = {"torch", "lightning", "segment_anything", "timm", "transformers", "cc3d", "numpy"}
    assert names.isdisjoint(heavy)


@pytest.mark.slow
def test_the_writer_without_its_extra_names_it():
    statement = "import sys; sys.modules['pyarrow'] = None; from lightning_samrefine import "
    command = [sys.executable, "-c", f"{statement}SAMRefineWriter"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (last,) = done.stderr.splitlines()[-1:]
    # Hooks that format tracebacks may put the class on a line of its own.
    assert "ModuleNotFoundError:" in done.stderr
    assert last.removeprefix("ModuleNotFoundError: ").startswith("SAMRefineWriter")
    assert 'pip install "lightning-samrefine[predict]"' in last


@pytest.mark.slow
def test_the_callback_loads_no_model_of_transformers():
    """transformers itself may come with torchmetrics, which uses it where it is installed."""
    names = loaded_by("from lightning_samrefine import SAMRefineCallback")
    assert {"lightning", "segment_anything"} <= names
    assert not any(name.startswith(("transformers.models.sam", "sam2")) for name in names)
