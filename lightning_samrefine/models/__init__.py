"""Promptable models behind one protocol, and `load_sam` that builds them."""

from lightning_samrefine.models.hf import HfPromptable
from lightning_samrefine.models.loading import SAM_NAMES, load_sam
from lightning_samrefine.models.protocol import (
    JointPromptable,
    MultimaskPromptable,
    Promptable,
    Prompts,
)

__all__ = [
    "SAM_NAMES",
    "HfPromptable",
    "JointPromptable",
    "MultimaskPromptable",
    "Promptable",
    "Prompts",
    "load_sam",
]
