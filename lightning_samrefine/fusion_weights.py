"""Weights of the fitted fusion: plain values that travel in checkpoints and as ``fitted.yaml``.

The score of class c at a pixel is Σ_f w_f · feature_f,c + b_c, and the refined probabilities are
the softmax of the scores. The features are those of `lightning_samrefine.refine.fusion.features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_samrefine.utils.validation import check_count, check_number

FEATURES = ("raw", "color", "presence", "region_votes")
SAM_FEATURES = ("region_votes",)
PRESET_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"raw": 1.0, "color": 1.3, "presence": 0.0, "region_votes": 1.0}
)

_KEYS = (
    "refine",
    "classes",
    "features",
    "biases",
    "control",
    "frozen_classes",
    "images",
    "found",
    "sam",
)


@dataclass(frozen=True)
class LogLinear:
    """Weights of features and biases of classes.

    Attributes:
        features: Names from `FEATURES`, in their order there, ``"raw"`` among them.
        weights: One weight for each feature.
        biases: C biases, one for each class.

    Raises:
        ValueError: Unknown, repeated or unordered features, or a number that is not finite.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    biases: tuple[float, ...]

    def __post_init__(self) -> None:
        ordered = tuple(name for name in FEATURES if name in self.features)
        if self.features != ordered or "raw" not in ordered:
            raise ValueError(
                f"features must be 'raw' and any of {', '.join(map(repr, FEATURES[1:]))} in this "
                f"order, got {', '.join(map(repr, self.features)) or 'none'}"
            )
        for name, values in (("weights", self.weights), ("biases", self.biases)):
            if not all(abs(value) < float("inf") for value in values):
                raise ValueError(f"{name} must be finite numbers, got {list(values)}")

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.biases)

    @classmethod
    def preset(cls, features: Sequence[str], num_classes: int) -> LogLinear:
        """Return the weights of the soft fusion without biases."""
        weights = tuple(PRESET_WEIGHTS[name] for name in features)
        return cls(tuple(features), weights, (0.0,) * num_classes)


@dataclass(frozen=True)
class FusionWeights:
    """What was fitted to one segmenter, one SAM and one kind of images.

    Attributes:
        fusion: The fusion with SAM.
        control: The fusion without SAM.
        classes: C class names; the classes' indices as strings if they have no names.
        refine: Whether the fusion is used; if not, every pixel keeps the raw prediction.
        frozen_classes: Classes that keep their raw pixels.
        images: Number of images that the weights were fitted to; 0 for a preset's weights.
        found: What the cross-validation found, in one sentence.
        sam: The name of the SAM that they were fitted with; empty if it is unknown.
        source: Where they come from, in words.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: Equal names of classes, a control with features of SAM, or a value outside its
            range.
    """

    fusion: LogLinear
    control: LogLinear
    classes: tuple[str, ...]
    refine: bool = True
    frozen_classes: tuple[int, ...] = ()
    images: int = 0
    found: str = ""
    sam: str = ""
    source: str = field(default="this run", compare=False)

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be different names, got {list(self.classes)}")
        of_sam = [name for name in self.control.features if name in SAM_FEATURES]
        if of_sam:
            raise ValueError(f"control.features must be without SAM's, got {', '.join(of_sam)}")
        if not isinstance(self.refine, bool):
            raise TypeError(f"refine must be true or false, got {self.refine!r}")
        check_count("images", self.images, least=0)
        for name in ("found", "sam"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        return f"weights from {self.source}, fitted to {self.images} images: {self.found}"

    def check_sam(self, name: str) -> None:
        """Refuse a SAM of another name.

        Raises:
            ValueError: The weights were fitted with another SAM.
        """
        if self.sam not in ("", name):
            raise ValueError(
                f"sam must be {self.sam!r}, the model that the weights were fitted with, got "
                f"{name!r}"
            )

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, as `from_mapping` reads them."""
        return {
            "refine": self.refine,
            "sam": self.sam,
            "found": self.found,
            "images": self.images,
            "classes": list(self.classes),
            "frozen_classes": [self.classes[c] for c in self.frozen_classes],
            **_plain(self.fusion, self.classes),
            "control": _plain(self.control, self.classes),
        }

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any], source: str = "refine") -> FusionWeights:
        """Build weights from plain values.

        Without the key ``sam`` it is unknown.

        Raises:
            TypeError: A value of the wrong type.
            ValueError: A missing or unknown key, an unknown class, or a value outside its range.
        """
        values = {"sam": "", **_checked_mapping("weights", values)}
        _check_keys("keys", values, _KEYS)
        names = values["classes"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"classes must be a list of strings, got {names!r}")
        frozen = values["frozen_classes"]
        if not isinstance(frozen, list):
            raise TypeError(f"frozen_classes must be a list of class names, got {frozen!r}")
        unknown = [name for name in frozen if name not in names]
        if unknown:
            listed = ", ".join(map(str, unknown))
            raise ValueError(f"frozen_classes must be among {', '.join(names)}, got {listed}")
        if len(set(frozen)) < len(frozen):
            raise ValueError(f"frozen_classes must be different names, got {frozen}")
        control = _checked_mapping("control", values["control"])
        _check_keys("control", control, ("features", "biases"))
        return cls(
            fusion=_log_linear("", values, names),
            control=_log_linear("control.", control, names),
            classes=tuple(names),
            refine=values["refine"],
            frozen_classes=tuple(sorted(names.index(name) for name in frozen)),
            images=values["images"],
            found=values["found"],
            sam=values["sam"],
            source=source,
        )


def _plain(weights: LogLinear, classes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {
        "features": dict(zip(weights.features, weights.weights, strict=True)),
        "biases": dict(zip(classes, weights.biases, strict=True)),
    }


def _log_linear(where: str, values: Mapping[Any, Any], classes: list[str]) -> LogLinear:
    features = _checked_mapping(f"{where}features", values["features"])
    biases = _checked_mapping(f"{where}biases", values["biases"])
    _check_keys(f"{where}biases", biases, classes)
    # In the order of FEATURES; unknown ones come last and are refused.
    names = sorted(features, key=lambda name: [*FEATURES, name].index(name))
    return LogLinear(
        tuple(names),
        tuple(check_number(f"{where}features.{name}", features[name]) for name in names),
        tuple(check_number(f"{where}biases.{name}", biases[name]) for name in classes),
    )


def _checked_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {value!r}")
    return value


def _check_keys(name: str, values: Mapping[Any, Any], keys: tuple[str, ...] | list[str]) -> None:
    if set(values) != set(keys):
        raise ValueError(
            f"{name} must be {', '.join(keys)}, got {', '.join(map(str, values)) or 'none'}"
        )
