"""The package's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return ``$SAMREFINE_HOME``, else ``lightning-samrefine`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME``, else ``~/.cache``.
    """
    chosen = os.environ.get("SAMREFINE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches).expanduser() / "lightning-samrefine"
