"""The benchmark's figures as one markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.camvid.data import CLASS_NAMES, RESOLUTIONS
from benchmarks.camvid.verify import Verification
from lightning_samrefine import RefineConfig
from lightning_samrefine.config import PRESETS

Metrics = Mapping[str, float | None]

NETWORK_INPUT = {"full": "480x360", "half": "240x176"}


def results_page(
    metrics: Mapping[str, Metrics],
    verifications: Sequence[Verification],
    config: RefineConfig,
    command: str,
) -> str:
    """Write the results page.

    Args:
        metrics: what the callback logged for the test split, by resolution.
        verifications: the check of the raw prediction, one a resolution.
        config: the thresholds that were used.
        command: what produced the figures.
    """
    frames = max(verification.frames for verification in verifications)
    return "\n".join(
        [
            "# CamVid: ESPNet refined by SAM",
            "",
            f"`{command}`",
            "",
            f"{frames} test frames of 480x360, SAM `vit_t`; figures in %, gains in points. mIoU is "
            "the mean over the 11 classes of one confusion matrix of the whole split, void ground "
            "truth ignored; trimap mIoU counts only the pixels within 3 px of a border between "
            "classes; Boundary IoU is that of Cheng et al. (CVPR 2021), d = 2% of the diagonal, "
            "mean over classes. The interval is a paired bootstrap over images, 95%. Fixed pixels "
            "were wrong and are right, broken ones the reverse. Raw and refined both use the "
            "11-way argmax: the network's void output is dropped before the softmax.",
            "",
            _summary(metrics),
            "",
            _thresholds(config),
            "",
            "## IoU by class",
            "",
            _classes(metrics),
            "",
            "## The raw prediction is the known one",
            "",
            "Argmax over all 12 outputs, a predicted void counts as wrong, against the label maps "
            "that came with the data; checked before anything is refined.",
            "",
            *(f"- {verification}" for verification in verifications),
            "",
        ]
    )


def _summary(metrics: Mapping[str, Metrics]) -> str:
    rows = []
    for key in RESOLUTIONS:
        found = metrics[key]
        rows.append(
            [
                NETWORK_INPUT[key],
                *_three(found, "test/miou_raw", "test/miou_refined"),
                _interval(found),
                *_three(found, "test/trimap_miou_raw", "test/trimap_miou_refined"),
                *_three(found, "test/boundary_iou_raw", "test/boundary_iou_refined"),
                *_changed(found),
                _percent(found.get("test/refine_accept_rate")),
                f"{found['test/refine_regions_per_image']:.1f}",
            ]
        )
    head = ["network sees", "mIoU raw", "refined", "gain", "95% interval"]
    head += ["trimap mIoU raw", "refined", "gain", "Boundary IoU raw", "refined", "gain"]
    head += ["fixed px", "broken px", "fixed / broken"]
    return _table([*head, "accepted", "regions an image"], rows)


def _thresholds(config: RefineConfig) -> str:
    known = next((name for name in PRESETS if config == RefineConfig.preset(name)), None)
    own = {
        name: value
        for name, value in vars(config).items()
        if value != getattr(RefineConfig(), name)
    }
    listed = ", ".join(f"`{name}` {value}" for name, value in own.items())
    named = f"the preset `{known}`: " if known else ""
    return (
        f"Refined with {named}{listed or 'nothing else'}; everything else has "
        "`RefineConfig`'s defaults. How it was chosen: [QUALITY.md](../QUALITY.md)."
    )


def _classes(metrics: Mapping[str, Metrics]) -> str:
    head = ["class"]
    for key in RESOLUTIONS:
        head += [f"{NETWORK_INPUT[key]} raw", "refined", "gain"]
    rows = []
    for name in CLASS_NAMES:
        row = [name]
        for key in RESOLUTIONS:
            row += _three(metrics[key], f"test/iou_raw/{name}", f"test/iou_refined/{name}")
        rows.append(row)
    return _table(head, rows)


def _three(metrics: Metrics, raw_key: str, refined_key: str) -> list[str]:
    raw, refined = metrics.get(raw_key), metrics.get(refined_key)
    gain = "n/a" if raw is None or refined is None else f"{100 * (refined - raw):+.2f}"
    return [_percent(raw), _percent(refined), gain]


def _interval(metrics: Metrics) -> str:
    low, high = (metrics.get(f"test/miou_gain_{end}") for end in ("low", "high"))
    return "n/a" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"


def _changed(metrics: Metrics) -> list[str]:
    fixed, broken, ratio = (
        metrics.get(f"test/refine_{name}")
        for name in ("fixed_px", "broken_px", "fixed_broken_ratio")
    )
    if fixed is None or broken is None or ratio is None:
        return ["n/a"] * 3
    return [f"{fixed:.0f}", f"{broken:.0f}", f"{ratio:.2f}"]


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows))
