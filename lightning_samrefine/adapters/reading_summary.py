"""Summarizes in one line what is read from a batch, for the log."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_samrefine.adapters.batch_adapter import Reading
from lightning_samrefine.adapters.candidates import items
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.adapters.scores import kind_of


def summarize(reading: Reading, ignore_index: int | None = None) -> str:
    """Describe the places and kinds of image, target and scores, and the shares not evaluated.

    Args:
        reading: A converted batch.
        ignore_index: Target value that is not counted.

    Returns:
        One sentence without a full stop, with the image's range as given and as SAM sees it.
    """
    inputs, roles = reading.inputs, reading.roles
    pairs = zip(inputs.labels, inputs.probs, strict=True)
    unknown = _share([(labels < 0) | (labels >= len(probs)) for labels, probs in pairs])
    shares = [f"{unknown:.1%} of the pixels predicted outside [0, {len(inputs.probs[0])})"]
    if inputs.targets is not None and ignore_index is not None:
        ignored = _share([target == ignore_index for target in inputs.targets])
        shares.insert(0, f"{ignored:.1%} of the target's pixels ignored")
    if roles is None or roles.image is None or roles.scores is None:
        parts = [f"RefineInputs of {len(inputs)} samples from the adapter"]
    else:
        given, seen = _range(roles.image.value), _range(inputs.images)
        parts = [f"image {roles.image} with values {given}"]
        if reading.colors:
            parts[0] += f", {reading.colors}"
        if seen != given:
            parts[0] += f", seen by SAM as {seen}"
        if roles.target is not None:
            parts.append(f"target {roles.target}")
        scores = items(roles.scores.value)[0]
        if reading.is_overlapping:
            one_map = kind_of(scores.flatten(0, 1)[:, None], reading.kind)
            kind = f"{one_map.removesuffix(' of class 1')} of {scores.shape[1]} overlapping classes"
        else:
            kind = kind_of(scores, reading.kind)
        replaced = reading.has_network_probs
        is_replaced = replaced is not None and bool(replaced.all())
        source = ", with the probabilities of the forward hook's scores" if is_replaced else ""
        parts.append(f"scores {roles.scores}, {kind}{source}")
    if reading.slices is not None:
        parts.append(str(reading.slices))
    if reading.padding is not None:
        parts.append(str(reading.padding))
    return f"reads {'; '.join([*parts, *shares])}"


def _range(value: Samples) -> str:
    bounds = [torch.stack(torch.aminmax(item.float())) for item in items(value)]
    low, high = torch.stack(bounds).aminmax()
    return f"{float(low):.4g} to {float(high):.4g}"


def _share(masks: list[Tensor]) -> float:
    total = sum(mask.numel() for mask in masks)
    return sum(int(mask.sum()) for mask in masks) / max(total, 1)
