"""What does the installed plugin add to the start of somebody else's Hydra app?

``python -m benchmarks.hydra_start`` starts interpreters that have imported Hydra, as any app has,
and prints the processor time that importing the plugin and extending the search path take.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

_STARTS = 11
_MEASURE = """
import hydra, time
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.plugins import Plugins
path = ConfigSearchPathImpl()
Plugins.instance()
start = time.process_time()
from lightning_samrefine.cli.hydra_plugin import SAMRefineSearchPath
SAMRefineSearchPath().manipulate_search_path(path)
print(1000 * (time.process_time() - start))
"""


def main() -> None:
    """Print the median and the range over fresh interpreters."""
    times = []
    for _ in range(_STARTS):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE], check=True, capture_output=True, text=True
        )
        times.append(float(done.stdout))
    print(
        f"plugin: {statistics.median(times):.1f} ms (median of {_STARTS}, "
        f"{min(times):.1f} to {max(times):.1f})"
    )


if __name__ == "__main__":
    main()
