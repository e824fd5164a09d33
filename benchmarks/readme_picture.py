"""Make the picture in README: run `samrefine` as a newcomer does, and keep its curve and panels.

python benchmarks/readme_picture.py                  # runs the command first
python benchmarks/readme_picture.py --run FOLDER     # takes a finished run's folder
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).with_name("readme_picture.png")
WIDTH = 1000


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    if args.run is not None:
        compose(args.run, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_samrefine.app", f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True)
        compose(Path(folder), args.out)


def compose(run: Path, out: Path) -> None:
    """Put a run's curve above its test panels.

    Args:
        run: The run's output folder.
        out: The PNG to write.
    """
    parts = []
    for name in ("curve.png", "csv/panels/test.png"):
        with Image.open(run / name) as picture:
            scale = WIDTH / picture.width
            size = (WIDTH, round(picture.height * scale))
            parts.append(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    page = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    # 256 colours are plenty for flat class colours, and a fifth of the bytes.
    page.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
