"""The thresholds of a refinement, validated, without torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from lightning_samrefine.fusion_weights import PRESET_WEIGHTS, FusionWeights
from lightning_samrefine.utils.validation import check_count


@dataclass(frozen=True)
class RefineConfig:
    """Thresholds and weights of a refinement.

    The defaults are Algorithm 4 with every region prompted; the preset ``algorithm4`` has its
    published thresholds. ``points_per_side``, ``unsupported_weight``, ``color_weight`` and
    ``crf_weight`` are not part of it: 0 here, above 0 in ``default`` and ``fast``.

    Attributes:
        score_thresh: τ_c in [0, 1). A pixel whose largest probability is below it belongs to no
            region, and a class whose largest probability in the image is below it is skipped. 0
            disables both.
        mask_prompt_scale: τ_m > 0. Scales probabilities to the logits of SAM's mask prompt.
        pred_iou_thresh: τ_iou in [0, 1]. A region is accepted if SAM's predicted IoU is strictly
            greater.
        stride: r ≥ 1. Regions are found on the ⌊H/r⌋ × ⌊W/r⌋ grid.
        min_region_area: Minimum area of a prompted region, in pixels of that grid. 1 keeps all.
        max_regions: Maximum number of regions prompted per image (largest first); the others keep
            their raw prediction. Bounds the time of a speckled prediction. None for no limit.
        max_prompts_per_batch: Number of prompts decoded together. None for 32 on CUDA, 4
            elsewhere, and fewer once memory has run out.
        prompt_regions: Whether SAM is prompted with the regions.
        mask_prompts: Whether a region is prompted with a mask besides box and point.
        points_per_side: Number of points along the image's longer side in a grid of point prompts,
            whose masks depend on the image alone and are cached. 0 for no grid.
        encode_padding: Whether SAM encodes the padding with which it makes an image square, as
            published. Otherwise an image that is not square takes less time and gets slightly
            different masks; some models always do
            (`lightning_samrefine.models.base.UnpaddedPromptable`).
        unsupported_weight: In [0, 1). Factor of a class's probability where no mask supports it;
            ten times as much for the masks of regions beside a point grid. 0 is Algorithm 4's hard
            rule.
        color_weight: In [0, 8]. Exponent of p(class | color) / p(class), estimated from the image;
            0 ignores colors.
        crf_weight: At least 0. Weight of neighboring pixels of similar color in a final step of
            smoothing; 0 for none.
        classes: Indices of the refined classes in [0, C); None for all, empty for none. Regions of
            the other, frozen classes are not prompted, and a pixel changes its label only from one
            refined class to another.
        class_pred_iou_thresh: τ_iou of single classes, by index, in place of ``pred_iou_thresh``.
        class_names: Names of the C classes that the values were tuned for, by index; a run with
            other classes is refused. None for any.
        weights: Weights of the fitted fusion, which replaces the soft fusion and its
            ``unsupported_weight``, ``color_weight`` and ``crf_weight``. ``"auto"``: the callback
            fits them to the images of its evaluations; until it has, and without a callback, the
            soft fusion is used. None for the soft fusion.
        window: Side in image pixels of the square windows that SAM looks at one by one, in images
            with a longer side. ``"auto"``: SAM's own input size, in images whose long side exceeds
            1.5 times that. None: SAM looks at whole images.
        window_overlap: In [0, 0.5]. Share of a window that it has in common with the next one,
            over which the votes of their masks blend.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value outside its range; ``points_per_side``, ``color_weight``,
            ``crf_weight``, ``weights`` or ``window`` without ``unsupported_weight``; neither region
            nor point prompts; fitted weights of other classes than ``class_names``.
    """

    score_thresh: float = 0.0
    mask_prompt_scale: float = 8.0
    pred_iou_thresh: float = 0.5
    stride: int = 2
    min_region_area: int = 1
    max_regions: int | None = None
    max_prompts_per_batch: int | None = None
    prompt_regions: bool = True
    mask_prompts: bool = True
    points_per_side: int = 0
    encode_padding: bool = True
    unsupported_weight: float = 0.0
    color_weight: float = 0.0
    crf_weight: float = 0.0
    classes: tuple[int, ...] | None = None
    class_pred_iou_thresh: Mapping[int, float] | None = field(default=None, hash=False)
    class_names: tuple[str, ...] | None = None
    weights: FusionWeights | Literal["auto"] | None = field(default=None, repr=False)
    window: int | Literal["auto"] | None = None
    window_overlap: float = 0.25

    def __post_init__(self) -> None:
        for name, (in_range, accepted) in _FLOATS.items():
            _check_float(name, getattr(self, name), in_range, accepted)
        for name in ("stride", "min_region_area"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("max_regions", "max_prompts_per_batch"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value, alternative="or None"))
        for name in ("prompt_regions", "mask_prompts", "encode_padding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        points = check_count("points_per_side", self.points_per_side, least=0)
        object.__setattr__(self, "points_per_side", points)
        if self.window not in (None, "auto"):
            side = check_count(
                "window", self.window, least=32, alternative="pixels, 'auto' or None"
            )
            object.__setattr__(self, "window", side)
        for name in ("points_per_side", "color_weight", "crf_weight", "weights", "window"):
            if getattr(self, name) and not self.unsupported_weight:
                raise ValueError(
                    f"unsupported_weight must be above 0 with {name}, got {name} "
                    f"{getattr(self, name)!r} and unsupported_weight 0"
                )
        if not self.prompt_regions and not self.points_per_side:
            raise ValueError("prompt_regions must be True with points_per_side 0, got False")
        if self.weights is not None and (self.points_per_side or not self.prompt_regions):
            raise ValueError(
                "weights must be None without region prompts or with a point grid, got "
                f"prompt_regions {self.prompt_regions} and points_per_side {self.points_per_side}"
            )
        # YAML brings lists, and dicts that somebody else holds.
        object.__setattr__(self, "classes", _checked_classes(self.classes))
        object.__setattr__(
            self, "class_pred_iou_thresh", _checked_thresholds(self.class_pred_iou_thresh)
        )
        object.__setattr__(self, "class_names", _checked_names(self.class_names))
        object.__setattr__(self, "weights", _checked_weights(self.weights))
        if isinstance(self.weights, FusionWeights):
            if self.class_names not in (None, self.weights.classes):
                raise ValueError(
                    f"class_names must be those of weights, {', '.join(self.weights.classes)}, got "
                    f"{', '.join(self.class_names or ())}"
                )
            object.__setattr__(self, "class_names", self.weights.classes)

    @classmethod
    def preset(cls, name: str, /, **overrides: Any) -> RefineConfig:
        """Build a named configuration, with single fields replaced.

        Args:
            name: ``"algorithm4"`` (the published algorithm with its published thresholds, see
                docs/algorithm4.md); ``"fast"`` (one prompt per region, soft fusion); ``"auto"``
                (the same prompts, a fusion that is fitted to the user's images); ``"default"``
                (``"fast"`` and the masks of a point grid).
            **overrides: Fields of `RefineConfig`.

        Raises:
            ValueError: An unknown preset.
            TypeError: An unknown field, or a value of the wrong type.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(
                f"preset must be {', '.join(map(repr, sorted(PRESETS)))}, got {name!r}"
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(unknown_fields(unknown))
        return cls(**{**PRESETS[name], **overrides})


def unknown_fields(names: Sequence[str]) -> str:
    """Return an error's sentence about names that are no fields of `RefineConfig`."""
    known = sorted(field.name for field in fields(RefineConfig))
    hinted = []
    for name in names:
        near = difflib.get_close_matches(name, known)
        hinted.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name)
    return f"RefineConfig has no field {', '.join(hinted)}; its fields are {', '.join(known)}"


_FAST = {
    "min_region_area": 16,
    "max_regions": 500,
    "mask_prompts": False,
    "encode_padding": False,
    "unsupported_weight": 0.02,
    "color_weight": PRESET_WEIGHTS["color"],
    "crf_weight": 4.0,
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "algorithm4": {
            "score_thresh": 0.1,
            "mask_prompt_scale": 0.005,
            "pred_iou_thresh": 0.8,
            "min_region_area": 225,
        },
        "auto": {**_FAST, "weights": "auto"},
        "default": {**_FAST, "points_per_side": 8},
        "fast": _FAST,
    }
)

_LARGEST = sys.float_info.max  # an integer may be larger
_FLOATS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "score_thresh": (lambda value: 0 <= value < 1, "[0, 1)"),
    "mask_prompt_scale": (lambda value: 0 < value <= _LARGEST, "(0, inf)"),
    "pred_iou_thresh": (lambda value: 0 <= value <= 1, "[0, 1]"),
    "unsupported_weight": (lambda value: 0 <= value < 1, "[0, 1)"),
    # Beyond it the product of a float32 probability and its factor may overflow.
    "color_weight": (lambda value: 0 <= value <= 8, "[0, 8]"),
    "crf_weight": (lambda value: 0 <= value <= _LARGEST, "[0, inf)"),
    "window_overlap": (lambda value: 0 <= value <= 0.5, "[0, 0.5]"),
}


def _check_float(name: str, value: Any, in_range: Callable[[float], bool], accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be a number in {accepted}, got {value!r} of type {type(value).__name__}"
        )
    if not in_range(value):
        raise ValueError(f"{name} must be a number in {accepted}, got {value!r}")


def _checked_classes(classes: Any) -> tuple[int, ...] | None:
    """Return class indices as a sorted tuple."""
    if classes is None:
        return None
    accepted = "classes must be different integers of at least 0 in a sequence, or None"
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise TypeError(f"{accepted}, got {classes!r} of type {type(classes).__name__}")
    if not all(isinstance(c, int) and not isinstance(c, bool) for c in classes):
        raise TypeError(f"{accepted}, got {list(classes)}")
    if min(classes, default=0) < 0 or len(set(classes)) < len(classes):
        raise ValueError(f"{accepted}, got {list(classes)}")
    return tuple(sorted(classes))


def _checked_names(names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be strings in a sequence, or None, got {names!r}")
    return tuple(names)


def _checked_weights(weights: Any) -> FusionWeights | str | None:
    """Return weights; a mapping, as YAML files hold it, becomes `FusionWeights`."""
    if weights is None or weights == "auto" or isinstance(weights, FusionWeights):
        return weights
    if isinstance(weights, Mapping):
        try:
            return FusionWeights.from_mapping(weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"weights: {error}") from error
    raise TypeError(
        f"weights must be FusionWeights, a mapping of them, 'auto' or None, got {weights!r}"
    )


def _checked_thresholds(thresholds: Any) -> dict[int, float] | None:
    """Return thresholds by class, in the order of the classes."""
    if thresholds is None:
        return None
    name, accepted = "class_pred_iou_thresh", "a mapping of class indices to numbers, or None"
    if not isinstance(thresholds, Mapping):
        raise TypeError(
            f"{name} must be {accepted}, got {thresholds!r} of type {type(thresholds).__name__}"
        )
    classes = _checked_classes(list(thresholds))
    for c, value in thresholds.items():
        _check_float(f"{name}[{c}]", value, *_FLOATS["pred_iou_thresh"])
    return {c: thresholds[c] for c in classes or ()}
