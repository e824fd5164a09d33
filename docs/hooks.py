"""What MkDocs builds the site from: the repository's Markdown and what it links, as it lies."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/*/README.md")
LINKED = (
    "docs/pictures/*",
    "benchmarks/**/*.png",
    "benchmarks/**/*.csv",
    "examples/**/*.py",
    "examples/**/*.yaml",
    "notebooks/*.ipynb",
    "lightning_samrefine/models/weights/MODEL_CARD.md",
    "LICENSE",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs_dir`` by those of the repository, under their paths in it."""
    found = sorted({path for pattern in (*PAGES, *LINKED) for path in ROOT.glob(pattern)})
    ours = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in found
        if path.is_file()
    ]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])
