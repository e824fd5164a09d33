"""Promptable models behind one protocol, and `load_sam` that builds them."""

from lightning_samrefine.models.hf import HfPromptable
from lightning_samrefine.models.loading import load_sam
from lightning_samrefine.models.protocol import (
    JointPromptable,
    MultimaskPromptable,
    Promptable,
    Prompts,
)

__all__ = [
    "HfPromptable",
    "JointPromptable",
    "MultimaskPromptable",
    "Promptable",
    "Prompts",
    "load_sam",
]
