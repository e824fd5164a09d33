"""Separates errors of the set-up, printed in one sentence, from those that keep a traceback.

A mistyped path needs no traceback. An error in a user's own module or data set needs one, of any
class.
"""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

_LONGEST_MESSAGE = 600
# Packages between the command and its own parts. Code of any other package is the user's.
_MACHINERY = {
    "lightning_samrefine",
    "hydra",
    "lightning",
    "lightning_utilities",
    "numpy",
    "omegaconf",
    "PIL",
    "pyarrow",
    "safetensors",
    "torch",
    "torchmetrics",
    "torchvision",
}
# torch reports an error of a worker process as text.
_OF_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


class SetupError(Exception):
    """A wrong set-up, explained in one sentence; the cause is chained."""


def explain(error: Exception) -> str | None:
    """Describe in one sentence what is wrong with the set-up; None for other failures.

    Args:
        error: As it left `lightning_samrefine.cli.main.run`.

    Returns:
        None, too, for a ``ValueError`` or ``FileNotFoundError`` with code outside this package and
        its libraries in the traceback.
    """
    # The cheap classes first: loading Lightning to report a mistyped path would take seconds.
    is_setup = (
        isinstance(error, SetupError | OmegaConfBaseException)
        or (isinstance(error, ValueError | FileNotFoundError) and not _has_foreign_code(error))
        or _is_misconfiguration(error)
        or str(error).startswith("Error(s) in loading state_dict")  # a RuntimeError of torch
        or (isinstance(error, ImportError) and "pip install" in str(error))  # an extra is absent
    )
    if not is_setup:
        return None
    sentence = " ".join(_message(error).split())
    if len(sentence) > _LONGEST_MESSAGE:
        sentence = sentence[:_LONGEST_MESSAGE] + " …"
    return sentence


def _message(error: Exception) -> str:
    text = str(error)
    if _OF_WORKER.match(text):  # the traceback's last line, without the class
        return text.strip().rpartition("\n")[2].partition(": ")[2]
    return text


def _has_foreign_code(error: Exception) -> bool:
    """Whether a frame below the command's own `run` belongs to code that the user brought."""
    if _OF_WORKER.match(str(error)):
        files = re.findall(r'File "(.+?)", line', str(error))
        return not all(_is_machinery(file) for file in files)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    command = [index for index, frame in enumerate(frames) if _is_command(frame.f_code.co_filename)]
    below = names[command[-1] + 1 :] if command else names
    return not all(
        (top := name.partition(".")[0]) in _MACHINERY or top in sys.stdlib_module_names
        for name in below
    )


def _is_command(file: str) -> bool:
    return Path(file) == Path(__file__).with_name("main.py")


def _is_machinery(file: str) -> bool:
    parts = Path(file).parts
    if "site-packages" in parts or "dist-packages" in parts or not _MACHINERY.isdisjoint(parts):
        return not _MACHINERY.isdisjoint(parts)
    return Path(file).is_relative_to(Path(traceback.__file__).parent)


def _is_misconfiguration(error: Exception) -> bool:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)
