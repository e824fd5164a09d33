"""Where the package keeps files of its own between runs."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return ``$SAMREFINE_HOME``, else ``lightning-samrefine`` in the user's cache folder.

    The latter is ``$XDG_CACHE_HOME``, ``~/.cache`` standing in.
    """
    chosen = os.environ.get("SAMREFINE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches).expanduser() / "lightning-samrefine"
