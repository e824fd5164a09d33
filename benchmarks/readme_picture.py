"""Make the pictures of README and docs/: run `samrefine` as a newcomer does.

python benchmarks/readme_picture.py                  # runs the command first
python benchmarks/readme_picture.py --run FOLDER     # takes a finished run's folder

The curve above the panels of the test set, and a screenshot of the report, which needs selenium and
Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).with_name("readme_picture.png")
REPORT_PICTURE = Path(__file__).with_name("report.png")
WIDTH = 1000
REPORT_SIZE = (1280, 1500)


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    args = parser.parse_args()
    if args.run is not None:
        compose(args.run, PICTURE)
        photograph(args.run, REPORT_PICTURE)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_samrefine.cli.main", f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True)
        compose(Path(folder), PICTURE)
        photograph(Path(folder), REPORT_PICTURE)


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
    # 256 colors are plenty for flat class colors, and a fifth of the bytes.
    page.quantize(256).save(out, optimize=True)


def photograph(run: Path, out: Path) -> None:
    """Open a run's report in headless Chromium and keep the top of the page.

    Args:
        run: The run's output folder.
        out: The PNG to write.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={REPORT_SIZE[0]},{REPORT_SIZE[1]}",
        ):  # fmt: skip
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=service)
        try:
            browser.get((run / "report.html").resolve().as_uri())
            browser.save_screenshot(str(out))
        finally:
            browser.quit()
    with Image.open(out) as picture:  # without fewer colors: swatches would change theirs
        picture.convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    main()
