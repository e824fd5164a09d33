"""Would Segment Anything make my segmenter's masks better, where, and by how much?

The public names below are imported on first use, so that `import lightning_samrefine` itself
loads neither torch nor a SAM backend.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from lightning_samrefine.callback import SAMRefineCallback
    from lightning_samrefine.config import RefineConfig
    from lightning_samrefine.models import load_sam
    from lightning_samrefine.refinement import Refinement
    from lightning_samrefine.refiner import Refiner
    from lightning_samrefine.self_check import check
    from lightning_samrefine.writer import SAMRefineWriter

__all__ = [
    "RefineConfig",
    "Refinement",
    "Refiner",
    "SAMRefineCallback",
    "SAMRefineWriter",
    "check",
    "load_sam",
]

_HOME = {
    "SAMRefineCallback": "callback",
    "SAMRefineWriter": "writer",
    "RefineConfig": "config",
    "Refinement": "refinement",
    "Refiner": "refiner",
    "check": "self_check",
    "load_sam": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
