"""The rule of folders that CONTRIBUTING.md describes, read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_samrefine"
TESTS = ROOT / "tests"
# A folder imports only from itself and from those of earlier lines.
ORDER = (
    ("utils",),
    ("fusion_weights",),
    ("config",),
    ("config_files",),
    ("adapters",),
    ("models",),
    ("refine",),
    ("metrics",),
    ("fit",),
    ("predictions",),
    ("reporting",),
    ("callbacks",),
    ("tune",),
    ("data", "segmenters", "demo"),
    ("testing", "self_check"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MOST_MODULES, MOST_LINES = 15, 400
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute names of what a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from lightning_samrefine import utils` names a folder in its second half.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(path: Path) -> str:
    """Return the folder of a module, or the module's own name at the top."""
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def public_home() -> dict[str, str]:
    """Return where the names of the package itself come from."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return {
                name: module.split(".")[0] for name, module in ast.literal_eval(node.value).items()
            }
    raise AssertionError("lightning_samrefine/__init__.py has no _HOME")


def test_a_folder_imports_only_from_those_before_it():
    home, wrong = public_home(), []
    for path in MODULES:
        own = folder(path)
        if own == "__init__":
            continue
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package != "lightning_samrefine":
                continue
            top = rest.partition(".")[0]
            theirs = home.get(top, top)
            if theirs == "__version__" or theirs == own:
                continue
            if RANK[theirs] >= RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("name", ["refine", "models"])
def test_the_refiner_needs_neither_lightning_nor_hydra(name):
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((PACKAGE / name).rglob("*.py"))
        for module in imports(path)
        if module.partition(".")[0] in ("lightning", "pytorch_lightning", "hydra", "omegaconf")
    ]
    assert not found


def test_init_files_only_export():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue  # imports its names on first use
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom), path


def test_no_test_imports_another():
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    for path in TESTS.rglob("*.py"):
        for name in imports(path):
            assert tests.isdisjoint(name.split(".")), f"{path} imports {name}"


def test_folders_and_modules_are_small():
    for path in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())):
        modules = [module for module in path.glob("*.py") if module.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, path
    too_long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in MODULES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not too_long


def test_helpers_are_no_tests():
    for path in (TESTS / "helpers").glob("*.py"):
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert not [name for name in names if name.startswith("test_")], path
