"""The notebooks run from top to bottom, and have their outputs stored."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torchmetrics.functional.classification import multiclass_jaccard_index

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder):
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_stored_and_small(path):
    assert path.stat().st_size < 1_000_000
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    # Errors, warnings and paths are those of one machine.
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert not re.search(
        r"/(home|root|tmp|Users)/", "".join(out.get("text", "") for out in outputs)
    )


def test_quickstart_shows_accepted_and_rejected_regions(tmp_path):
    notebook = read(NOTEBOOKS / "quickstart.ipynb")
    execute(notebook, tmp_path)
    code = code_cells(notebook)
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
    epochs = next(text for text in printed if text.startswith("epoch 0"))
    assert epochs.count("refined") == epochs.count("\n") == 5
    loose, strict = (text for text in printed if text.startswith("accepted above"))
    assert loose.count("accepted:") > strict.count("accepted:")
    assert strict.count("rejected:") > loose.count("rejected:")
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 3


def test_your_model_measures_three_choices(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    notebook = read(NOTEBOOKS / "your_model.ipynb")
    execute(notebook, tmp_path)
    printed = "".join(out.get("text", "") for cell in code_cells(notebook) for out in cell.outputs)
    rows = re.findall(r"^(\w+) +raw (\S+) -> (\S+), gain between", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["fast", "fitted", "tuned"]

    project = runpy.run_path(str(tmp_path / "project.py"))
    model, loader = project["Segmenter"](), project["Data"]().test_dataloader()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        predicted = torch.cat([model.eval()(batch["image"]).argmax(dim=1) for batch in loader])
    target = torch.cat([batch["mask"] for batch in loader])
    expected = multiclass_jaccard_index(predicted, target, num_classes=2).item()
    assert [float(raw) for _, raw, _ in rows] == pytest.approx([expected] * 3, abs=1e-3)
