"""A prediction run that is killed and started again ends in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import sys

import kill_trials
import pytest
from scripts import run_script

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and a subreaper")
def test_killed_runs_end_in_the_same_bytes(tmp_path):
    # A few here; benchmarks/RELIABILITY.md has the full count.
    done = run_script(kill_trials, tmp_path, "5", "8", "0")
    trials = json.loads(done.stdout.splitlines()[-1])
    assert trials["random_kills"] == 5
    assert trials["step_kills"] == 8
    assert trials["folders"] >= 10
    assert trials["torn_files_seen"] == 0
