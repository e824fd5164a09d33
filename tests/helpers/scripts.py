"""Tests that run in a process of their own, because it forks or is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType


def run_script(module: ModuleType, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module of this folder as a script, on one thread, and assert that it succeeds."""
    done = subprocess.run(
        [sys.executable, module.__file__, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
