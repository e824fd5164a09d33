"""How large the report gets, and how much memory panels and report take as images come.

    python -m benchmarks.report_size [--images 1000] [--height 360] [--width 480]

Images are synthetic blobs under noise, whose photographs compress worse than real ones. Memory is
the process's resident set, read after every tenth of the images.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from report_cases import add_image

from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.reporting.panels import PanelPicker
from lightning_samrefine.reporting.report import Gallery, ReportSection, write_report


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=480)
    args = parser.parse_args()
    torch.set_num_threads(1)
    comparison = RefinementComparison(19, 255)
    with tempfile.TemporaryDirectory() as folder:
        gallery, picker = Gallery(19, 255, Path(folder)), PanelPicker(4)
        sizes = []
        for index in range(args.images):
            add_image(comparison, gallery, index, (args.height, args.width), picker)
            if (index + 1) % max(1, args.images // 10) == 0:
                gc.collect()
                sizes.append(resident_mb())
                print(f"{index + 1:6d} images: {sizes[-1]:8.1f} MB resident", flush=True)
        # The first tenths fill pools that torch and the C library keep.
        middle = len(sizes) // 2
        growth = (sizes[-1] - sizes[middle - 1]) / (args.images * (len(sizes) - middle) / 10)
        print(f"growth in the second half: {1000 * growth:.2f} MB a thousand images")
        path = Path(folder) / "report.html"
        write_report(path, [ReportSection("test", None, comparison.result(), gallery)], {})
        print(
            f"report: {path.stat().st_size / 1e6:.1f} MB, {resident_mb():.1f} MB resident after it"
        )


def resident_mb() -> float:
    """Return the resident set of this process in 10⁶ bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
