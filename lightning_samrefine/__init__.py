"""Would Segment Anything make my segmenter's masks better, where, and by how much?

The public names below are imported on first use, so that `import lightning_samrefine` itself
loads neither torch nor a SAM backend.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from lightning_samrefine.callbacks.refine_callback import SAMRefineCallback
    from lightning_samrefine.callbacks.writer import SAMRefineWriter
    from lightning_samrefine.config import RefineConfig
    from lightning_samrefine.models import load_sam
    from lightning_samrefine.refine.refined_segmenter import RefinedSegmenter
    from lightning_samrefine.refine.refiner import Refiner
    from lightning_samrefine.refine.results import Refinement
    from lightning_samrefine.self_check import check

__all__ = [
    "RefineConfig",
    "RefinedSegmenter",
    "Refinement",
    "Refiner",
    "SAMRefineCallback",
    "SAMRefineWriter",
    "check",
    "load_sam",
]

_HOME = {
    "SAMRefineCallback": "callbacks.refine_callback",
    "SAMRefineWriter": "callbacks.writer",
    "RefineConfig": "config",
    "RefinedSegmenter": "refine.refined_segmenter",
    "Refinement": "refine.results",
    "Refiner": "refine.refiner",
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
