"""Targets for the speed of a refinement on one core, beside the measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENCODER, FIRST_EPOCH, SECOND_EPOCH = 0.20, 4.5, 14.0
_NEITHER = ("regions", "prompts", "upscaling and fusion")


def bars(results: Mapping[str, Any]) -> str:
    """Format every target with its figure, and the arithmetic of those out of reach.

    Args:
        results: As `benchmarks.speed` keeps them; without vit_b on one core nothing is printed.
    """
    base = results.get("vit_b, 1 core")
    if base is None:
        return ""
    lines = ["## Targets\n", "One core, `vit_b`, 40 regions, 720x960, bf16:\n"]
    lines += ["| what | target | measured | reached |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(base, results)]
    return "\n".join(lines) + "\n" + "".join(f"\n{text}\n" for text in _arithmetic(base))


def _rows(base: Mapping[str, Any], results: Mapping[str, Any]) -> list[list[str]]:
    costs, peaks = _costs(base, 40, 720), base["peaks"]
    literal = costs["literal encoder"] + costs["literal rest"]
    decoder = sum(costs[f"bf16-mixed first {step}"] for step in ("decoder", "prompts"))
    faster = [literal / costs[f"bf16-mixed {epoch} total"] for epoch in ("first", "second")]
    rows = [
        _at_most("encoder", ENCODER, base["encoders"]["ours, bf16 autocast"], "{:.2f}"),
        _at_most(
            "peak memory of the encoder, ratio to segment-anything's",
            0.2,
            peaks["encoder, ours, bf16"],
        ),
        _at_most("relative error of embeddings", 1.5e-2, base["errors"][0], "{:.1e}"),
        _at_least(
            "decoder and prompts, faster", 4.5, costs["official decoder"] / decoder, "{:.1f}x"
        ),
        _at_most("all but encoder and decoder", 0.04, _neither(costs), "{:.3f}"),
        _at_least("first epoch, faster than the reference", FIRST_EPOCH, faster[0], "{:.1f}x"),
        _at_least("second epoch, faster than the reference", SECOND_EPOCH, faster[1], "{:.1f}x"),
        _at_most("peak memory, ratio to the reference", 1 / 3, peaks["whole, ours, bf16"]),
    ]
    small = results.get("vit_t, 1 core")
    for name, figures, counts, heights in (
        ("`vit_b`, 40 to 160 regions", base, (40, 160), (720, 720)),
        ("`vit_b`, 40 regions, 4 times the pixels", base, (40, 40), (720, 1440)),
        ("`vit_t`, 40 to 160 regions", small, (40, 160), (720, 720)),
        ("`vit_t`, 160 regions, 4 times the pixels", small, (160, 160), (720, 1440)),
    ):
        ends = [_costs(figures, *case) for case in zip(counts, heights, strict=True)]
        if all(ends):
            growth = _neither(ends[1]) / _neither(ends[0])
            rows.append(
                _at_most(f"growth of all but encoder and decoder: {name}", 4, growth, "{:.1f}x")
            )
    if results.get("bf16"):
        figures = results["bf16"]
        rows.append(_at_least("labels equal to float32's", 0.995, figures["equal"], "{:.2%}"))
        rows.append(_at_least("masks' IoU with float32's", 0.98, figures["mean"], "{:.3f}"))
    return rows


def _arithmetic(base: Mapping[str, Any]) -> list[str]:
    """Explain which targets the time of the matrix products alone rules out."""
    encoders, costs = base["encoders"], _costs(base, 40, 720)
    floor = encoders["floor: its matrix products alone, bf16"]
    literal = costs["literal encoder"] + costs["literal rest"]
    may_take = literal / FIRST_EPOCH
    texts = []
    if floor > ENCODER:
        texts.append(
            f"An encoder of {ENCODER:.2f} is out of reach on this machine: the encoder's matrix "
            "products alone, in bf16, without copies, additions, softmax and norms, take "
            f"{floor:.2f}. This package takes {encoders['ours, bf16 autocast'] - floor:.2f} more."
        )
    rest = may_take - floor
    needed = costs["bf16-mixed first decoder"] + _neither(costs)
    if rest < needed:
        left = f"leaves {rest:.2f}" if rest > 0 else f"is {-rest:.2f} less than these products take"
        texts.append(
            f"A first epoch {FIRST_EPOCH}x faster is out of reach, too: it may take {literal:.2f} "
            f"/ {FIRST_EPOCH} = {may_take:.2f}, which {left} for everything but the encoder's "
            f"matrix products; decoder, regions, prompts and fusion alone take {needed:.2f}."
        )
    return texts


def _costs(figures: Mapping[str, Any] | None, regions: int, height: int) -> Mapping[str, float]:
    """Return the costs of a case, empty if it was not measured."""
    for case in figures["refinements"] if figures else ():
        if (case["regions"], case["height"]) == (regions, height):
            return case["costs"]
    return {}


def _neither(costs: Mapping[str, float]) -> float:
    return sum(costs[f"bf16-mixed first {step}"] for step in _NEITHER)


def _at_most(what: str, bar: float, value: float, form: str = "{:.2f}") -> list[str]:
    return [what, f"≤ {form.format(bar)}", form.format(value), "yes" if value <= bar else "no"]


def _at_least(what: str, bar: float, value: float, form: str) -> list[str]:
    return [what, f"≥ {form.format(bar)}", form.format(value), "yes" if value >= bar else "no"]
