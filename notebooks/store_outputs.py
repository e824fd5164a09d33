"""Run notebooks and store their outputs in them, with small pictures and without stderr.

python notebooks/store_outputs.py notebooks/quickstart.ipynb ...
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile

import nbformat
from nbclient import NotebookClient
from PIL import Image

WIDTH = 1000


def smaller(png: str) -> str:
    """Return a base64 PNG of at most `WIDTH` pixels and 256 colors."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    picture.quantize(256).save(stored, "png", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what other machines would not show, and make pictures small."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata = {}
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        for out in cell.outputs:
            data = out.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])


def main(paths: list[str]) -> None:
    """Run and rewrite each notebook."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(
                notebook, timeout=1800, record_timing=False, resources=resources
            ).execute()
        clean(notebook)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
