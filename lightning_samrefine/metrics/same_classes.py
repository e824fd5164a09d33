"""Which classes make raw and refined mIoU means over different sets, and the gain without them.

As torchmetrics' does, each mIoU leaves out the classes that occur neither in a target nor in its
own prediction. A class that no target has is in the mean of one side, with an IoU of 0, as soon
as that side predicts a pixel of it: the difference of the means then holds more than what changed.
"""

from __future__ import annotations

from textwrap import shorten

from lightning_samrefine.metrics.comparison import SIDES, ComparisonResult


def different_classes(result: ComparisonResult) -> str | None:
    """Return a sentence on the classes of one mean alone, None if the gain is the same without."""
    raw, refined = (~result.scores[side]["iou"].isnan() for side in SIDES)
    alone = {"raw": raw & ~refined, "refined": refined & ~raw}
    found = [
        f"{side}: {shorten(', '.join(result.class_names[i] for i in classes), 200)}"
        for side, only in alone.items()
        if (classes := only.nonzero()[:, 0].tolist())
    ]
    before, after = (result.scores[side]["miou"].item() for side in SIDES)
    same, gain = (round(100 * one, 2) for one in (result.same_classes_gain, after - before))
    if not found or same == gain:
        return None
    return (
        "a class in no target counts, with an IoU of 0, in the mIoU of a prediction that has it "
        f"({'; '.join(found)}); over the {int((raw & refined).sum())} classes of both means the "
        f"gain is {same:+.2f} points, not {gain:+.2f}"
    )
