"""Finds per-pixel class scores in a network's output, by name and shape."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from lightning_samrefine.adapters.candidates import IMAGE_NAMES, TARGET_NAMES
from lightning_samrefine.adapters.nested import Leaf, leaves, named
from lightning_samrefine.adapters.scores import is_score_map

SCORES_NAMES = (
    "logits", "probs", "probabilities", "scores", "preds", "pred", "predictions", "prediction",
    "out", "output", "outputs", "y_hat", "y_pred", "masks_pred", "pred_masks",
)  # fmt: skip
# Tensors with such a name are not scores, even with the shape of scores.
OTHER_PATTERN = re.compile(
    r"loss|uncert|entrop|varian|std|weight|dist|sdf|edge|bound|contour|depth|flow|feat|embed|"
    r"atten|attn|heat|error|valid|ignore|recon|normal|aux|teacher"
)
_IMAGE_OR_TARGET = re.compile(r"image|img|pixel|rgb|mask|target|label|truth|annot|^gt|_gt")
SCORES_PATTERN = re.compile(r"logit|prob|score|pred")

QUERIES = (
    "class scores and masks of queries (as Mask2Former and MaskFormer return them), which are not "
    "per-pixel class scores: post-process them in the step and return {'logits': …}, or give an "
    "adapter"
)


def network_scores(outputs: Any, num_classes: int) -> list[Leaf]:
    """Return the candidates for a network's scores, one if it is clear.

    They are float (B, C, H, W), or (B, C, D, H, W) of volumes.

    A usual name such as ``"out"`` of torchvision's networks and ``"logits"`` of transformers'
    precedes a single tensor of that shape. Networks do not return targets: ``"mask"`` and the like
    are their prediction.
    """
    queries = query_masks(outputs, num_classes)

    def fits(leaf: Leaf) -> bool:
        return (
            isinstance(leaf.value, Tensor)
            and is_score_map(_as_map(leaf.value), num_classes)
            and not any(leaf.value is mask for mask in queries)
        )

    by_name = [leaf for leaf in named(outputs, SCORES_NAMES) if fits(leaf)]
    if by_name:
        return by_name[:1]
    return [
        leaf
        for leaf in leaves(outputs)
        if fits(leaf)
        and (
            str(leaf.path[-1] if leaf.path else "").lower() in TARGET_NAMES
            or not is_something_else(leaf.path)
        )
    ]


def _as_map(value: Tensor) -> Tensor:
    """Return volumes with one dimension fewer, and other tensors as they are."""
    return value.flatten(2, 3) if value.ndim == 5 else value


def query_masks(outputs: Any, num_classes: int) -> list[Tensor]:
    """Return masks of queries: (B, Q, h, w) beside class scores (B, Q, K) of the same queries."""
    found = tensors(outputs)
    classes = [(path, one) for path, one in found if one.ndim == 3 and one.is_floating_point()]
    return [
        masks
        for path, masks in found
        if masks.ndim == 4
        and any(
            own_path[:-1] == path[:-1]
            and one.shape[:2] == masks.shape[:2]
            and (
                one.shape[2] == num_classes + 1
                or re.search("class|logit", str(own_path[-1]).lower())
            )
            for own_path, one in classes
        )
    ]


def tensors(outputs: Any) -> list[tuple[tuple[str | int, ...], Tensor]]:
    """Return the paths and values of the leaves that are one tensor."""
    return [(leaf.path, leaf.value) for leaf in leaves(outputs) if isinstance(leaf.value, Tensor)]


def is_something_else(path: tuple[str | int, ...]) -> bool:
    """Whether a name shows that a tensor is not the scores, whatever its shape."""
    name = str(path[-1]).lower() if path else ""
    if OTHER_PATTERN.search(name):
        return True
    if name in IMAGE_NAMES or name in TARGET_NAMES:
        return True
    return bool(_IMAGE_OR_TARGET.search(name)) and not SCORES_PATTERN.search(name)
