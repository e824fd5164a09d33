"""The quickstart notebook runs from top to bottom and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_stripped(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_it_runs_and_shows_accepted_and_rejected_regions(notebook, tmp_path):
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
    epochs = next(text for text in printed if text.startswith("epoch 0"))
    assert epochs.count("refined") == epochs.count("\n") == 5
    loose, strict = (text for text in printed if text.startswith("accepted above"))
    assert loose.count("accepted:") > strict.count("accepted:")
    assert strict.count("rejected:") > loose.count("rejected:")
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 3
