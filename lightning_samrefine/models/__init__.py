"""Promptable models behind one protocol, and `load_sam` that builds them."""

from lightning_samrefine.models.base import JointPromptable, Promptable, Prompts
from lightning_samrefine.models.hf import HfPromptable
from lightning_samrefine.models.registry import SAM_NAMES, load_sam

__all__ = [
    "SAM_NAMES",
    "HfPromptable",
    "JointPromptable",
    "Promptable",
    "Prompts",
    "load_sam",
]
