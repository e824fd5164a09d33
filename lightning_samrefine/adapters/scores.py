"""Converts logits, probabilities or label maps to probabilities and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.utils.validation import WrongValuesError

SCORES_KINDS = ("auto", "logits", "probs", "labels", "multilabel")
ScoresKind: TypeAlias = Literal["auto", "logits", "probs", "labels", "multilabel"]

_SUM_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_DEFAULT_SUM_TOLERANCE = 1e-3
# Logits of a weak network may all lie in [0, 1]; a batch of probabilities has nearly certain
# pixels.
_EXTREME = 0.005
# Logits of one channel are below; those of a batch without background may all be positive.
_LARGEST_LOGIT = 50

# Total probability of the classes other than a label map's. At exactly 0, Algorithm 4 could never
# give a pixel another class (step 10 multiplies by it); above 0 the raw class still wins wherever
# its own mask covers the pixel.
_OTHER_CLASSES = 1e-3


def is_score_map(value: Tensor, num_classes: int) -> bool:
    """Whether a tensor looks like a network's scores: float (B, C, H, W), C = 1 if binary."""
    return (
        value.ndim == 4
        and value.is_floating_point()
        and value.shape[1] in ({num_classes} if num_classes != 2 else {1, 2})
    )


def has_whole_stride(scores_hw: tuple[int, int], image_hw: tuple[int, int]) -> bool:
    """Whether scores have an image's size, or that divided by an integer stride (the same in x, y).

    The quotient may be rounded up or down: networks differ in this.
    """
    (height, width), (full_height, full_width) = scores_hw, image_hw
    if not (0 < height <= full_height and 0 < width <= full_width):
        return False
    return any(
        height in (full_height // stride, -(-full_height // stride))
        and width in (full_width // stride, -(-full_width // stride))
        for stride in range(1, max(full_height // height, full_width // width) + 2)
    )


def one_hot_labels(maps: Tensor) -> Tensor | None:
    """Return the labels of hard predictions, None for any other values.

    Args:
        maps: (B, K, h, w), one-hot over K ≥ 2 classes; or 0 and 1 in (B, 1, h, w) or (B, h, w).

    Returns:
        (B, h, w) int64.
    """
    if maps.ndim not in (3, 4) or not _is_binary(maps):
        return None
    if maps.ndim == 3 or maps.shape[1] == 1:
        return (maps if maps.ndim == 3 else maps[:, 0]).long()
    return maps.long().argmax(dim=1) if bool((maps.sum(dim=1) == 1).all()) else None


def is_label_map(scores: Tensor, kind: ScoresKind) -> bool:
    """Whether `to_probs` reads scores as a label map."""
    if kind == "labels" or (kind == "auto" and not scores.is_floating_point()):
        return True
    return kind != "logits" and one_hot_labels(scores) is not None


def kind_of(scores: Tensor, kind: ScoresKind) -> str:
    """Return the kind of scores that `to_probs` reads, in words."""
    if kind == "multilabel":
        return kind_of(scores.flatten(0, 1)[:, None], "auto")
    if is_label_map(scores, kind):
        return "label map"
    maps = scores[:, None] if scores.ndim == 3 else scores
    of_class = " of class 1" if maps.ndim == 4 and maps.shape[1] == 1 else ""
    is_probs = _are_probs(maps) if kind == "auto" else torch.tensor(kind == "probs")
    if bool(is_probs.all()):
        return "probabilities" + of_class
    return "logits" + of_class if not bool(is_probs.any()) else "logits and probabilities by image"


class BinaryKind:
    """Determines the kind of one-channel scores from the first batch and keeps it for later ones.

    A batch of logits may lie in [0, 1] by chance, and would be thresholded at 0.5 instead of at 0.

    Attributes:
        settled: ``"logits"`` or ``"probs"``, None until it is known.
    """

    def __init__(self) -> None:
        self.settled: str | None = None

    def __call__(
        self, scores: Sequence[Tensor] | Tensor, name: str = "", network: Tensor | None = None
    ) -> ScoresKind:
        """Return the kind to pass to `to_probs`, ``"auto"`` if it is clear from the values.

        Args:
            scores: (B, 1, h, w), (B, h, w), or a list of B without the first dimension.
            name: Key of the scores.
            network: The network's own scores, (B, 1, h, w), whose sigmoid is a probability.

        Raises:
            WrongValuesError: Values outside [0, 1] after those of earlier batches were read as
                probabilities.
            ValueError: A first batch in [0, 1] that is named logits, or without any pixel as
                certain as the probabilities of a trained network; or one in a range of
                percentages or of log-probabilities.
        """
        parts = [one for one in scores if one.is_floating_point() and one.numel() > 0]
        if not parts or (self.settled is None and all(map(_is_binary, parts))):
            return "auto"
        if self.settled == "logits":
            return "logits"
        tolerance = _SUM_TOLERANCE.get(parts[0].dtype, _DEFAULT_SUM_TOLERANCE)
        # A broken image must not affect the others.
        finite = [one[one.isfinite()].float() for one in parts]
        bounds = [torch.stack(torch.aminmax(one)) for one in finite if one.numel() > 0]
        if not bounds:
            return "auto"
        low, high = torch.stack(torch.stack(bounds).aminmax()).tolist()
        inside = low >= -tolerance and high <= 1 + tolerance
        if self.settled == "probs" and not inside:
            raise WrongValuesError(
                f"scores must be in [0, 1] like those of the batches before, got {low:.4g} to "
                f"{high:.4g}. Set scores_kind='logits' if they are logits of one channel"
            )
        one_class = (low >= 0 and high > _LARGEST_LOGIT) or (low < 0 and -_EXTREME < high <= 0)
        if self.settled is None and one_class and "logit" not in name.lower():
            raise ValueError(
                "scores_kind must be 'logits' if scores of one channel are logits from "
                f"{low:.4g} to {high:.4g}, all of class {int(low >= 0)}, got 'auto': divide "
                "probabilities of 0 to 100 or 255 by the largest, and exponentiate their logarithms"
            )
        if inside and self.settled is None:
            undecided = low > _EXTREME and high < 1 - _EXTREME and "prob" not in name.lower()
            undecided = undecided and not _is_sigmoid(scores, network)
            if undecided or "logit" in name.lower():
                raise ValueError(
                    "scores_kind must be 'logits' or 'probs' if scores of one channel"
                    f"{f' named {name!r}' if name else ''} lie in [0, 1], got 'auto' and values "
                    f"from {low:.4g} to {high:.4g}: logits are cut at 0, probabilities at 0.5"
                )
        self.settled = "probs" if inside else "logits"
        return "auto" if inside else "logits"


def _is_sigmoid(scores: Sequence[Tensor] | Tensor, logits: Tensor | None) -> bool:
    """Whether scores are the sigmoid of others, except for rounding."""
    if logits is None or not isinstance(scores, Tensor) or scores.numel() != logits.numel():
        return False
    pair = scores.detach().flatten().float(), logits.to(scores.device).flatten().float().sigmoid()
    return torch.allclose(*pair, rtol=0, atol=_DEFAULT_SUM_TOLERANCE, equal_nan=True)


def refuse_unclear_sums(scores: Samples, name: str) -> None:
    """Refuse scores of several classes that ``"auto"`` cannot tell from a sigmoid for each class.

    Args:
        scores: Scores of a batch, or a list of its samples.
        name: What the error calls them.

    Raises:
        ValueError: All values lie in [0, 1], and the sums over the classes are 1 in no image.
            Logits have negative values, and those of a layer that starts at 0 are all 0; an
            untrained network without either has to be named. Or the sum is the same, above 1, in
            every pixel, as that of several networks' probabilities or of percentages.
    """
    parts = [scores] if isinstance(scores, Tensor) else [one[None] for one in scores]
    soft = [one.ndim == 4 and one.shape[1] > 1 and one.is_floating_point() for one in parts]
    if not all(soft) or not all(one.numel() for one in parts) or not parts:
        return
    tolerance = _SUM_TOLERANCE.get(parts[0].dtype, _DEFAULT_SUM_TOLERANCE)
    # Not if NaN. A sigmoid is never negative, the logits of an untrained network are by little.
    outside = [torch.stack([(one < 0).any(), (one > 1 + tolerance).any()]) for one in parts]
    negative, above = torch.stack(outside).any(dim=0).tolist()
    if negative:
        return
    clear = [_are_probs(one).any() | ((one == 0) | (one == 1)).all() for one in parts]
    if not above and bool(torch.stack(clear).any()):
        return
    sums = torch.stack([torch.stack(torch.aminmax(one.float().sum(dim=1))) for one in parts])
    low, high = float(sums.min()), float(sums.max())
    if above and high - low <= tolerance * low:
        raise ValueError(
            f"scores must sum to 1 over the classes, got {low:.4g} in every pixel of {name}: "
            "divide probabilities by their sum, or set scores_kind='logits'"
        )
    if above:
        return
    raise ValueError(
        "scores_kind must be 'logits', 'probs' or 'multilabel' if scores of several classes lie in "
        f"[0, 1] and do not sum to 1, got 'auto' and sums from {low:.4g} to {high:.4g} in {name}: "
        "'multilabel' for overlapping classes, 'probs' for a sigmoid for each of other classes, "
        "'logits' for an untrained network's logits"
    )


def to_probs(
    scores: Tensor, kind: ScoresKind, num_classes: int, image_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Convert scores to probabilities and labels of the image's size.

    Rules of ``"auto"``: integers are labels, and so are one-hot maps of any dtype (for two classes
    also a single map of 0 and 1), unless the kind is ``"logits"``. Images of C channels whose
    values lie in [0, 1] and sum to 1 within 1e-3 (bf16: 2e-2) are probabilities, others logits, for
    a softmax. A batch of one-channel maps that lies in [0, 1] as a whole holds probabilities of
    class 1, any other holds logits, for a sigmoid. With the kind ``"probs"`` they need not sum to
    1: Algorithm 4 treats each class independently.

    Args:
        scores: (B, C, h, w) float; (B, 1, h, w) or (B, h, w) float of a binary model; (B, h, w)
            or (B, 1, h, w) label maps. Maps smaller than the image are enlarged: scores
            bilinearly (logits before the softmax), labels to the nearest.
        kind: Kind of scores.
        num_classes: C ≥ 2.
        image_hw: (H, W) of the images.

    Returns:
        Probabilities (B, C, H, W) float32 in [0, 1]; labels (B, H, W) int64, their argmax. A
        label map gives 0.999 to its class and the rest to the others in equal parts, and 1/C to
        all if its value is outside [0, C), which the labels keep.

    Raises:
        ValueError: Another shape, a size that is not the image's over an integer stride,
            probabilities outside [0, 1], or binary class maps that overlap.
    """
    if kind == "multilabel":
        return to_probs(scores.flatten(0, 1)[:, None], "auto", 2, image_hw)
    channels = 1 if scores.ndim == 3 else scores.shape[1] if scores.ndim == 4 else 0
    fits = channels == num_classes or (channels == 1 and num_classes == 2)
    is_binary = fits and kind != "logits" and _is_binary(scores)
    if is_binary and (hard := one_hot_labels(scores)) is not None:
        return _from_labels(hard, num_classes, image_hw)
    if kind == "labels" or (kind == "auto" and not scores.is_floating_point()):
        return _from_labels(scores, num_classes, image_hw)
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floats as {kind}, got dtype {scores.dtype}")
    maps = scores[:, None] if scores.ndim == 3 else scores
    if maps.ndim != 4 or not is_score_map(maps, num_classes):
        binary = "(B, 2, h, w), (B, 1, h, w) or (B, h, w)"
        accepted = binary if num_classes == 2 else f"(B, {num_classes}, h, w)"
        raise ValueError(
            f"scores must be {accepted} for num_classes={num_classes}, got shape "
            f"{tuple(scores.shape)}"
        )
    are_all = are_some = kind == "probs"
    if kind == "auto":
        is_probs = _are_probs(maps)
        # In one download: each would make the CPU wait for a GPU.
        are_all, are_some = torch.stack([is_probs.all(), is_probs.any()]).tolist()
    if kind == "probs":
        _check_probs(maps)
    if kind == "auto" and is_binary and bool(maps.any()):
        _refuse_overlap(maps)
    maps = _enlarge(maps.float(), image_hw, "bilinear")
    if maps.shape[1] == 1:
        foreground = maps.clamp(0, 1) if are_all else maps.sigmoid()
        # Not from both probabilities: 1 - p is rounded, p > 0.5 is not.
        labels = (foreground[:, 0] > 0.5).long()
        return torch.cat([1 - foreground, foreground], dim=1), labels
    labels = maps.argmax(dim=1)
    if are_all:
        return maps.clamp(0, 1), labels
    probs = maps.softmax(dim=1)
    if are_some:
        probs = torch.where(is_probs.view(-1, 1, 1, 1), maps.clamp(0, 1), probs)
    return probs, labels


def probs_behind_labels(
    probs: Samples, labels: Samples, scores: Samples, kind: ScoresKind, captured: Tensor
) -> tuple[Samples, Tensor | None]:
    """Replace the probabilities of label maps by those of the network's scores behind them.

    The labels stay those of the step, as do the raw metrics.

    Args:
        probs: (B, C, H, W) float32, from `to_probs`.
        labels: (B, H, W) int64, from the same call.
        scores: The step's scores.
        kind: Their kind; nothing is replaced unless it is ``"auto"``.
        captured: (B, C, h, w) or (B, 1, h, w) float, the network's scores.

    Returns:
        Probabilities (B, C, H, W) float32, and (B,) bool, the images with the network's
        probabilities: those whose labels all equal the labels of its scores. Without a batch of
        label maps, or with captured scores of other images or of an unknown kind, ``probs`` and
        None.
    """
    if not (isinstance(probs, Tensor) and isinstance(labels, Tensor)):
        return probs, None
    fits = len(captured) == len(probs) and is_score_map(captured, probs.shape[1])
    if kind != "auto" or not fits:
        return probs, None
    if not isinstance(scores, Tensor) or not is_label_map(scores, kind):
        return probs, None
    try:
        kind = "auto" if captured.shape[1] > 1 else BinaryKind()(captured)
        refuse_unclear_sums(captured, "forward hook")
        soft, own = to_probs(captured, kind, probs.shape[1], (labels.shape[1], labels.shape[2]))
    except ValueError:
        return probs, None
    same = ((own == labels) & soft.isfinite().all(dim=1)).flatten(1).all(dim=1)
    return torch.where(same.view(-1, 1, 1, 1), soft, probs), same


def _from_labels(
    scores: Tensor, num_classes: int, image_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    maps = scores[:, 0] if scores.ndim == 4 and scores.shape[1] == 1 else scores
    if maps.ndim != 3:
        raise ValueError(
            "scores must be (B, h, w) or (B, 1, h, w) as label maps, got shape "
            f"{tuple(scores.shape)} of {scores.dtype}"
        )
    # interpolate has no kernel for int64; float32 holds every label below 2²⁴.
    labels = _enlarge(maps[:, None].float(), image_hw, "nearest-exact")[:, 0].long()
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    probs = torch.where(
        labels[:, None] == classes, 1 - _OTHER_CLASSES, _OTHER_CLASSES / (num_classes - 1)
    )
    unknown = (labels < 0) | (labels >= num_classes)
    return probs.masked_fill_(unknown[:, None], 1 / num_classes), labels


def _are_probs(maps: Tensor) -> Tensor:
    """Decide whether maps are probabilities: per image, (B,) bool; one channel for all at once.

    NaN is ignored, and an image of several channels does not affect the others: a broken image
    must not turn the rest of its batch from probabilities into logits.
    """
    tolerance = _SUM_TOLERANCE.get(maps.dtype, _DEFAULT_SUM_TOLERANCE)
    outside = (maps < -tolerance) | (maps > 1 + tolerance)
    if maps.shape[1] == 1:
        return (~(outside & maps.isfinite()).any()).expand(len(maps))
    total = maps.float().sum(dim=1)
    strange = outside.any(dim=1) | ((total - 1).abs() > tolerance)
    return ~(strange & ~total.isnan()).flatten(1).any(dim=1)


def _is_binary(maps: Tensor) -> bool:
    return bool(((maps == 0) | (maps == 1)).all())


def _refuse_overlap(maps: Tensor) -> NoReturn:
    """Raise for maps of 0 and 1 that are not one-hot: neither logits nor probabilities do this."""
    share = float((maps.sum(dim=1) != 1).float().mean())
    raise ValueError(
        f"scores must be logits, probabilities or one class a pixel, got values of 0 and 1 only, "
        f"with no class or several in {share:.1%} of the pixels. Return the probabilities, "
        "or set scores_kind='multilabel' if classes overlap, 'probs' or 'logits' if not"
    )


def _check_probs(maps: Tensor) -> None:
    tolerance = _SUM_TOLERANCE.get(maps.dtype, _DEFAULT_SUM_TOLERANCE)
    if bool(((maps < -tolerance) | (maps > 1 + tolerance)).any()):
        low, high = torch.stack(torch.aminmax(maps.float())).tolist()
        raise ValueError(
            f"scores must be in [0, 1] for scores_kind='probs', got values from {low:.4g} to "
            f"{high:.4g}; set scores_kind='logits' or 'auto'"
        )


def _enlarge(maps: Tensor, image_hw: tuple[int, int], mode: str) -> Tensor:
    height, width = maps.shape[-2:]
    if (height, width) == image_hw:
        return maps
    if height > image_hw[0] or width > image_hw[1]:
        raise ValueError(
            f"scores must not exceed the image's {image_hw}, got (h, w) = {(height, width)}"
        )
    if not has_whole_stride((height, width), image_hw):
        raise ValueError(
            f"scores must have the image's size {image_hw}, or that divided by an integer stride, "
            f"got {(height, width)}, which fits no integer stride: the network pads, crops or "
            "resizes its input, and where the pixels belong is unknown. In the step, resize the "
            "scores to what the network was given, crop the padding, and return them"
        )
    align = False if mode == "bilinear" else None
    return nnf.interpolate(maps, image_hw, mode=mode, align_corners=align)
