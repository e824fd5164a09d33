"""The CamVid benchmark: check the raw prediction, refine the test frames, write the figures.

Run from the root of the repository: ``python -m benchmarks.camvid.run``. It composes the configs
of this folder with those of the ``samrefine`` command and runs that once for each resolution.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.camvid.data import REPOSITORY, RESOLUTIONS, data_root, missing_files
from benchmarks.camvid.report import results_page
from benchmarks.camvid.verify import Verification, verify
from lightning_samrefine import RefineConfig
from lightning_samrefine.cli import main as app

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run; exits with a message where something is missing or wrong."""
    options = _parse(arguments)
    root = data_root()
    missing = missing_files(root)
    if missing:
        listed = "\n  ".join(map(str, missing))
        sys.exit(f"SAMREFINE_DATA names {root}, where these are missing:\n  {listed}")

    verifications = [verify(root, key, options.limit) for key in RESOLUTIONS]
    print(*verifications, sep="\n")
    if not all(verification.passed for verification in verifications):
        sys.exit("The raw prediction is not the known one: nothing was refined.")
    if options.verify:
        return
    page = refine_test(root, options.output, verifications, options.limit, options.overrides)
    results = options.results or (
        options.output / "RESULTS.md" if options.limit or options.overrides else HERE / "RESULTS.md"
    )
    results.write_text(page, encoding="utf-8")
    print(page, f"Written to {results}; logs are in {options.output}", sep="\n")


def refine_test(
    root: Path,
    output: Path,
    verifications: list[Verification],
    limit: int | None = None,
    overrides: list[str] | None = None,
) -> str:
    """Run the command for each resolution.

    Args:
        root: the data folder.
        output: logs, metrics and the resolved config go to a folder a resolution under it.
        verifications: the check of the raw prediction, for the page.
        limit: maximum number of test frames; None takes all.
        overrides: more of Hydra's overrides, such as ``refine.pred_iou_thresh=0.7``.

    Returns:
        The results page.
    """
    metrics, config = {}, RefineConfig()
    for key in RESOLUTIONS:
        folder = output.resolve() / key
        with initialize_config_dir(str(app.config_dir()), version_base="1.3"):
            cfg = compose(
                "samrefine",
                overrides=[
                    f'hydra.searchpath=["file://{CONFIGS}"]',
                    "+experiment=camvid",
                    f"segmenter.resolution={key}",
                    *([f"trainer.limit_test_batches={limit}"] if limit else []),
                    *(overrides or []),
                ],
            )
        # Not as overrides: a path may hold characters of Hydra's grammar.
        cfg.data_root, cfg.output_dir = str(root), str(folder)
        app.run(cfg)
        metrics[key] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        config = RefineConfig(**OmegaConf.to_container(cfg.refine, resolve=True))
    command = " ".join(["python -m benchmarks.camvid.run", *(overrides or [])])
    return results_page(metrics, verifications, config, command)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.camvid.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--verify", action="store_true", help="check the raw prediction and stop")
    parser.add_argument("--limit", type=int, help="maximum number of test frames")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "outputs" / "camvid", help="folder of the logs"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="the page to write; RESULTS.md here, or in the output folder for anything but the "
        "benchmark itself",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides: refine.pred_iou_thresh=0.7")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
