"""Logits, probabilities or label maps: all become probabilities and labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.utils.validation import WrongValuesError

SCORES_KINDS = ("auto", "logits", "probs", "labels")
ScoresKind: TypeAlias = Literal["auto", "logits", "probs", "labels"]

_SUM_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_DEFAULT_SUM_TOLERANCE = 1e-3
# Logits of a weak network may all lie in [0, 1]; in a batch of probabilities some pixel is nearly
# certain.
_EXTREME = 0.005

# Probability of all the classes together that a label map does not name. At exactly 0, Algorithm 4
# could never give a pixel another class (step 10 multiplies by it); above 0 the raw class still
# wins wherever its own mask covers the pixel.
_OTHER_CLASSES = 1e-3


def is_score_map(value: Tensor, num_classes: int) -> bool:
    """Whether a tensor looks like a network's scores: float (B, C, H, W), C = 1 where binary."""
    return (
        value.ndim == 4
        and value.is_floating_point()
        and value.shape[1] in ({num_classes} if num_classes != 2 else {1, 2})
    )


def has_whole_stride(scores_hw: tuple[int, int], image_hw: tuple[int, int]) -> bool:
    """Whether scores have an image's size, or that divided by one whole number in both directions.

    Both roundings of the quotient count: networks differ in them.
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
    """Return the labels of hard predictions, None where there are others.

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
    """Whether `to_probs` takes scores for a label map."""
    if kind == "labels" or (kind == "auto" and not scores.is_floating_point()):
        return True
    return kind != "logits" and one_hot_labels(scores) is not None


def kind_of(scores: Tensor, kind: ScoresKind) -> str:
    """Return in words what `to_probs` takes scores for."""
    if is_label_map(scores, kind):
        return "label map"
    maps = scores[:, None] if scores.ndim == 3 else scores
    of_class = " of class 1" if maps.ndim == 4 and maps.shape[1] == 1 else ""
    is_probs = _are_probs(maps) if kind == "auto" else torch.tensor(kind == "probs")
    if bool(is_probs.all()):
        return "probabilities" + of_class
    return "logits" + of_class if not bool(is_probs.any()) else "logits and probabilities by image"


class BinaryKind:
    """What scores of one channel are, settled by the first batch and kept for those after it.

    A batch of logits may lie in [0, 1] by accident, and would be cut at 0.5 instead of at 0.

    Attributes:
        settled: ``"logits"`` or ``"probs"``, None until a batch has shown it.
    """

    def __init__(self) -> None:
        self.settled: str | None = None

    def __call__(self, scores: Sequence[Tensor] | Tensor, name: str = "") -> ScoresKind:
        """Return the kind that `to_probs` is to take them for, ``"auto"`` where it can tell.

        Args:
            scores: (B, 1, h, w), (B, h, w), or a list of B without the first dimension.
            name: What they were found under.

        Raises:
            WrongValuesError: Values outside [0, 1] after those of earlier batches were read as
                probabilities.
            ValueError: A first batch in [0, 1] that is named logits, or in which no pixel is as
                certain as probabilities of a trained network are.
        """
        parts = [one for one in scores if one.is_floating_point() and one.numel() > 0]
        if not parts or (self.settled is None and all(map(_is_binary, parts))):
            return "auto"
        if self.settled == "logits":
            return "logits"
        tolerance = _SUM_TOLERANCE.get(parts[0].dtype, _DEFAULT_SUM_TOLERANCE)
        # A broken image decides nothing for the others.
        finite = [one[one.isfinite()].float() for one in parts]
        bounds = [torch.stack(torch.aminmax(one)) for one in finite if one.numel() > 0]
        if not bounds:
            return "auto"
        low, high = torch.stack(torch.stack(bounds).aminmax()).tolist()
        inside = low >= -tolerance and high <= 1 + tolerance
        if self.settled == "probs" and not inside:
            raise WrongValuesError(
                f"scores must be in [0, 1], as which those before were read, got {low:.4g} to "
                f"{high:.4g}. Set scores_kind='logits' if they are logits of one channel"
            )
        if inside and self.settled is None:
            undecided = low > _EXTREME and high < 1 - _EXTREME and "prob" not in name.lower()
            if undecided or "logit" in name.lower():
                raise ValueError(
                    "scores_kind must be 'logits' or 'probs' if scores of one channel"
                    f"{f' named {name!r}' if name else ''} lie in [0, 1], got 'auto' and values "
                    f"from {low:.4g} to {high:.4g}: logits are cut at 0, probabilities at 0.5"
                )
        self.settled = "probs" if inside else "logits"
        return "auto" if inside else "logits"


def to_probs(
    scores: Tensor, kind: ScoresKind, num_classes: int, image_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Bring scores to the image's size as probabilities and labels.

    ``"auto"`` decides so: integers are labels, and so are one-hot maps of any type (for two
    classes also a single map of 0 and 1), unless they are named ``"logits"``. Images of C channels
    whose values lie in [0, 1] and sum to 1 within 1e-3 (bf16: 2e-2) are probabilities, others
    logits, for a softmax. A batch of one-channel maps that lies in [0, 1] as a whole holds
    probabilities of class 1, any other holds logits, for a sigmoid. Probabilities that are named
    so need not sum to 1: Algorithm 4 looks at each class by itself.

    Args:
        scores: (B, C, h, w) float; (B, 1, h, w) or (B, h, w) float of a binary model; (B, h, w)
            or (B, 1, h, w) label maps. Maps smaller than the image are enlarged: scores
            bilinearly (logits before the softmax), labels to the nearest.
        kind: What the scores are.
        num_classes: C ≥ 2.
        image_hw: (H, W) of the images.

    Returns:
        Probabilities (B, C, H, W) float32 in [0, 1]; labels (B, H, W) int64, their argmax. A
        label map gives 0.999 to its class and the rest to the others in equal parts, and 1/C to
        all where its value is outside [0, C), which the labels keep.

    Raises:
        ValueError: A shape that fits neither, a size that no whole stride makes of the image's,
            probabilities outside [0, 1], or classes of 0 and 1 that overlap.
    """
    channels = 1 if scores.ndim == 3 else scores.shape[1] if scores.ndim == 4 else 0
    fits = channels == num_classes or (channels == 1 and num_classes == 2)
    is_binary = fits and kind != "logits" and _is_binary(scores)
    if is_binary and (hard := one_hot_labels(scores)) is not None:
        return _from_labels(hard, num_classes, image_hw)
    if kind == "labels" or (kind == "auto" and not scores.is_floating_point()):
        return _from_labels(scores, num_classes, image_hw)
    if not scores.is_floating_point():
        raise ValueError(f"scores: got dtype {scores.dtype}, accepted as {kind} is a float type")
    maps = scores[:, None] if scores.ndim == 3 else scores
    if maps.ndim != 4 or not is_score_map(maps, num_classes):
        binary = "(B, 2, h, w), (B, 1, h, w) or (B, h, w)"
        accepted = binary if num_classes == 2 else f"(B, {num_classes}, h, w)"
        raise ValueError(
            f"scores: got shape {tuple(scores.shape)}, accepted for num_classes={num_classes} is "
            f"{accepted}"
        )
    are_all = are_some = kind == "probs"
    if kind == "auto":
        is_probs = _are_probs(maps)
        # In one download: each would make the CPU wait for a GPU.
        are_all, are_some = torch.stack([is_probs.all(), is_probs.any()]).tolist()
        if not are_all:
            _warn_of_sums(maps)
    if kind == "probs":
        _check_probs(maps)
    if kind == "auto" and is_binary and bool(maps.any()):
        _refuse_overlap(maps)
    maps = _enlarge(maps.float(), image_hw, "bilinear")
    if maps.shape[1] == 1:
        foreground = maps.clamp(0, 1) if are_all else maps.sigmoid()
        # By the scores themselves: 1 - p may round where p > 0.5 does not.
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
    """Give label maps the probabilities of the network's scores that they were made of.

    The labels, of which raw figures are made, are those of the step in any case.

    Args:
        probs: (B, C, H, W) float32, what `to_probs` made of scores.
        labels: (B, H, W) int64, what it made of them as well.
        scores: What the step returned.
        kind: What they are; only under ``"auto"`` is anything replaced.
        captured: (B, C, h, w) or (B, 1, h, w) float, what left the network.

    Returns:
        Probabilities (B, C, H, W) float32, and (B,) bool, the images that have them from the
        network: those whose every label is that of its scores. Without a batch of label maps, or
        with captured scores of other images or of no certain kind, ``probs`` and None.
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
            f"scores: got shape {tuple(scores.shape)} of {scores.dtype}, accepted as label maps is "
            "(B, h, w) or (B, 1, h, w)"
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
    """Decide per image, (B,) bool, or for all at once where there is one channel.

    NaN decides nothing, and one image of several channels nothing for the others: a broken image
    must not turn the rest of its batch from probabilities into logits.
    """
    tolerance = _SUM_TOLERANCE.get(maps.dtype, _DEFAULT_SUM_TOLERANCE)
    outside = (maps < -tolerance) | (maps > 1 + tolerance)
    if maps.shape[1] == 1:
        return (~(outside & maps.isfinite()).any()).expand(len(maps))
    total = maps.float().sum(dim=1)
    strange = outside.any(dim=1) | ((total - 1).abs() > tolerance)
    return ~(strange & ~total.isnan()).flatten(1).any(dim=1)


def _warn_of_sums(maps: Tensor) -> None:
    """Say so where maps taken for logits look like a sigmoid for each class."""
    if maps.shape[1] == 1:
        return
    # Logits of a network that has learnt nothing are small, too, but none stands out.
    low, high = torch.stack(torch.aminmax(maps.float())).tolist()
    if low >= 0 and 0.5 < high <= 1:
        total = maps.float().sum(dim=1)
        warnings.warn(
            f"scores: got values from {low:.4g} to {high:.4g} that sum to {float(total.min()):.4g} "
            f"up to {float(total.max()):.4g} over the classes, and took them for logits. Set "
            "scores_kind='probs' if they are a sigmoid for each class, 'logits' if they are not",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_binary(maps: Tensor) -> bool:
    return bool(((maps == 0) | (maps == 1)).all())


def _refuse_overlap(maps: Tensor) -> NoReturn:
    """Refuse maps of 0 and 1 that are not one-hot: neither logits nor probabilities look so."""
    share = float((maps.sum(dim=1) != 1).float().mean())
    raise ValueError(
        f"scores must be logits, probabilities or one class a pixel, got values of 0 and 1 alone, "
        f"which name no class or several in {share:.1%} of the pixels. Return the probabilities, "
        "or set scores_kind='probs' or 'logits' to have them taken as they are"
    )


def _check_probs(maps: Tensor) -> None:
    tolerance = _SUM_TOLERANCE.get(maps.dtype, _DEFAULT_SUM_TOLERANCE)
    if bool(((maps < -tolerance) | (maps > 1 + tolerance)).any()):
        low, high = torch.stack(torch.aminmax(maps.float())).tolist()
        raise ValueError(
            f"scores: got values from {low:.4g} to {high:.4g}, accepted for scores_kind='probs' is "
            "[0, 1]; set scores_kind='logits' or 'auto'"
        )


def _enlarge(maps: Tensor, image_hw: tuple[int, int], mode: str) -> Tensor:
    height, width = maps.shape[-2:]
    if (height, width) == image_hw:
        return maps
    if height > image_hw[0] or width > image_hw[1]:
        raise ValueError(
            f"scores: got (h, w) = {(height, width)}, accepted is at most the image's {image_hw}"
        )
    if not has_whole_stride((height, width), image_hw):
        raise ValueError(
            f"scores must have the image's size {image_hw}, or that divided by a whole stride, got "
            f"{(height, width)}, which no whole stride makes of it: the network pads, crops or "
            "resizes its input, and where the pixels belong is unknown. In the step, resize the "
            "scores to what the network was given, crop the padding, and return them"
        )
    align = False if mode == "bilinear" else None
    return nnf.interpolate(maps, image_hw, mode=mode, align_corners=align)
