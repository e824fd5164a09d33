"""Which classes are refined and which are frozen.

A frozen class keeps its raw map to the pixel, whatever the fusion: none of its regions is prompted,
no pixel leaves it and none enters it. So its IoU is the raw one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import upload


def check_classes(
    config: RefineConfig, num_classes: int, class_names: Sequence[str] | None = None
) -> None:
    """Refuse thresholds tuned for other classes, and indices of classes that do not exist.

    Args:
        config: Its ``class_names`` are the classes that it was tuned for.
        num_classes: C.
        class_names: C names, None if they are unknown.

    Raises:
        ValueError: The config was tuned for another number of classes or for other names, or a
            class of ``classes`` or ``class_pred_iou_thresh`` is not below C.
    """
    tuned_for = config.class_names
    if tuned_for is not None:
        # Classes without names go by their indices. Names of another number are those of the file.
        indices = tuple(map(str, range(num_classes)))
        named = class_names is not None and len(class_names) == num_classes
        names = tuple(class_names or ()) if named else indices
        are_other = indices not in (names, tuned_for) and names != tuned_for
        if len(tuned_for) != num_classes or are_other:
            raise ValueError(
                f"refine: thresholds must be tuned for the {num_classes} classes of this run "
                f"({', '.join(names)}), got thresholds tuned for {len(tuned_for)} "
                f"({', '.join(tuned_for)})"
            )
    for name in ("classes", "class_pred_iou_thresh"):
        beyond = [c for c in getattr(config, name) or () if c >= num_classes]
        if beyond:
            raise ValueError(
                f"{name} must be classes below num_classes={num_classes}, got "
                f"{', '.join(map(str, beyond))}"
            )


def regions_of_refined_classes(regions: RegionSet, classes: Sequence[int] | None) -> RegionSet:
    """Drop the regions of frozen classes before they are prompted.

    Args:
        regions: N regions.
        classes: The refined classes; all of them if None.
    """
    if classes is None:
        return regions
    return regions.select(np.isin(regions.classes, np.array(classes, dtype=np.int64)))


def restore_frozen_classes(
    refinement: Refinement, raw: RawPrediction, classes: Sequence[int] | None
) -> Refinement:
    """Take back every change of a pixel from or to a frozen class.

    Such a pixel gets its raw label and its raw probabilities. A raw label outside [0, C) is no
    class and never frozen.

    Args:
        refinement: Of the whole image.
        raw: Of the same image; its labels are computed only if a class is frozen.
        classes: The refined classes; all of them if None.
    """
    if classes is None:
        return refinement
    labels, num_classes = raw.labels, len(raw.probs)
    # One more entry, for labels that are no class.
    frozen = torch.ones(num_classes + 1, dtype=torch.bool)
    frozen[[*classes, num_classes]] = False
    frozen = upload(frozen, labels.device)
    known = (labels >= 0) & (labels < num_classes)
    before = torch.where(known, labels, num_classes)
    after = torch.where(refinement.labels == labels, before, refinement.labels)
    taken_back = (after != before) & (frozen[before] | frozen[after])

    def restored(refined: Tensor | None) -> Tensor | None:
        return None if refined is None else torch.where(taken_back, raw.probs, refined)

    return replace(
        refinement,
        labels=torch.where(taken_back, labels, refinement.labels),
        probs=restored(refinement.probs),
        literal_probs=restored(refinement.literal_probs),
    )
