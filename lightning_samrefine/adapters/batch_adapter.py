"""Converts a user's batch and step output to the inputs of the refiner and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import Found, Roles, hint_at_missing, items
from lightning_samrefine.adapters.custom_adapter import (
    check_shapes,
    checked_image,
    checked_probs,
    unpack,
)
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.layouts.conversion import FoundTensors, convert
from lightning_samrefine.adapters.layouts.overlapping import scores_by_class
from lightning_samrefine.adapters.layouts.padding import Padding, RealParts
from lightning_samrefine.adapters.layouts.volumes import Slices, find_slices
from lightning_samrefine.adapters.nested import Samples, describe
from lightning_samrefine.adapters.network_scores import QUERIES, query_masks
from lightning_samrefine.adapters.network_view import NetworkCall
from lightning_samrefine.adapters.role_search import MissingTargetError, RoleSearch
from lightning_samrefine.adapters.scores import (
    SCORES_KINDS,
    BinaryKind,
    ScoresKind,
    refuse_unclear_sums,
)
from lightning_samrefine.adapters.target_values import whole_numbers
from lightning_samrefine.utils.device import plain
from lightning_samrefine.utils.validation import WrongValuesError


@dataclass(frozen=True)
class RefineInputs:
    """B samples in the formats that the refiner expects, all on one device.

    Each field is a batched tensor, or a list of B tensors without the batch dimension if
    images differ in size.

    Attributes:
        images: (B, 3, H, W) uint8 RGB.
        probs: (B, C, H, W) float32 in [0, 1], the raw probabilities.
        labels: (B, H, W) int64, the raw prediction; values outside [0, C) mean "unknown".
        targets: (B, H, W) int64, or None without targets.
        parts: P names of the parts that every image of the batch is split into, the slices of a
            volume or the binary maps of overlapping classes; B is then P times the number of
            images, whose parts follow one another.
        groups: B names; images of one group, such as the slices of a volume, are neighbors. None
            if every image is one of its own.
    """

    images: Samples
    probs: Samples
    labels: Samples
    targets: Samples | None
    parts: tuple[str, ...] = ("",)
    groups: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, index: int) -> tuple[int, int]:
        """Return which part of its image a sample is, and the number of parts."""
        return index % len(self.parts), len(self.parts)

    def named(self, names: Sequence[str], separator: str = ", ") -> list[str]:
        """Return a name for each sample: that of its image, followed by that of its part."""
        if len(self.parts) == 1:
            return list(names)
        return [f"{name}{separator}{part}" for name in names for part in self.parts]

    def first(self, count: int) -> RefineInputs:
        """Return the samples of the first ``count`` images, all parts of each."""
        end = count * len(self.parts)
        return self._each(lambda values: values[:end], self.parts)

    def take(self, indices: Sequence[int]) -> RefineInputs:
        """Return the samples with these indices, in this order, as lists, each a whole."""
        return self._each(lambda values: [values[i] for i in indices], ("",))

    def _each(self, change: Callable[[Any], Any], parts: tuple[str, ...]) -> RefineInputs:
        changed: dict[str, Any] = {
            name: None if values is None else change(values)
            for name, values in vars(self).items()
            if name != "parts"
        }
        return RefineInputs(parts=parts, **changed)


@dataclass(frozen=True)
class Reading:
    """A converted batch and its sources.

    Attributes:
        inputs: The converted batch.
        roles: Where image, target and scores were found; None if an adapter returned
            `RefineInputs`.
        kind: The kind of scores they were converted as.
        has_network_probs: (B,) bool, label maps with the network's probabilities, or None.
        padding: What was cut off, or None.
        slices: The slices of volumes, or None.
        is_overlapping: Whether ``kind`` is that of a binary map for each class.
        colors: How the image became uint8 RGB, in words; empty if nothing was set.
    """

    inputs: RefineInputs
    roles: Roles | None
    kind: ScoresKind
    has_network_probs: Tensor | None = None
    padding: RealParts | None = None
    colors: str = ""
    slices: Slices | None = None
    is_overlapping: bool = False

    @property
    def has_label_maps(self) -> bool:
        """Whether the labels are those that were given; others are indices of probabilities."""
        scores = None if self.roles is None else self.roles.scores
        if scores is None or self.kind == "labels":
            return True
        return not all(one.is_floating_point() for one in items(scores.value))


AdapterFunction = Callable[[Any, Any, Tensor | None], RefineInputs | Mapping[str, Any]]
"""``adapter(batch, outputs, captured)``: the batch, the step's output, and the scores captured by a
forward hook (or None). Returns `RefineInputs`, or a mapping with ``image``, ``target`` and one of
``logits``, ``probs`` and ``labels``, which are then converted like those of a search."""


@dataclass(frozen=True)
class BatchAdapter:
    """Finds image, target and scores, and converts them.

    The image and the target are searched in the batch, then in the step's output: by the usual
    names (up to three containers deep), then by position, a tuple batch being (image, target, …);
    both come from one container if several hold them. Scores are the tensor with a usual name in
    the step's output, else the tensor captured by a forward hook, else a single tensor in the
    output or one with a usual name in the batch. See docs/reading.md, and `RoleSearch`.

    Args:
        num_classes: C ≥ 2. None until it is known; needed to convert.
        image_key: Key of the image, such as ``"image"``, ``"data.image"`` or ``"0"``.
        target_key: Key of the target.
        scores_key: Key of the scores; ``"forward"`` for the tensor captured by the forward hook.
        scores_kind: Kind of scores, see `to_probs`.
        slice_axis: Axis of volumes (B, C, D, H, W) whose slices are images.
        class_names: C names, for the parts of overlapping classes; None for "0", "1", …
        rgb: Undoes the image's normalization.
        binary: Determines the kind of scores of one channel.
        padding: Finds what is cut off from a padded batch.
        function: Replaces the search, see `AdapterFunction`.
        needs_target: Whether a batch without a target is an error; if False, no target is
            searched.
        device: Device of the conversion, for steps that return CPU tensors from a GPU run; None
            leaves every tensor on its device.

    Raises:
        TypeError: ``function`` is not callable, or a key is not a string.
        ValueError: An unknown ``scores_kind``.
    """

    num_classes: int | None = None
    _: KW_ONLY
    image_key: str | None = None
    target_key: str | None = None
    scores_key: str | None = None
    scores_kind: ScoresKind = "auto"
    slice_axis: int = 2
    class_names: Sequence[str] | None = None
    rgb: Denormalize = field(default_factory=Denormalize)
    binary: BinaryKind = field(default_factory=BinaryKind)
    padding: Padding = field(default_factory=Padding)
    function: AdapterFunction | None = None
    needs_target: bool = True
    device: torch.device | None = None

    def __post_init__(self) -> None:
        for name in ("image_key", "target_key", "scores_key"):
            key = getattr(self, name)
            if key is not None and not isinstance(key, str):
                raise TypeError(
                    f"{name} must be a string such as 'image', 'data.image' or, for a position, "
                    f"'0', got {key!r} of type {type(key).__name__}"
                )
        if self.scores_kind not in SCORES_KINDS:
            raise ValueError(
                f"scores_kind must be one of {', '.join(map(repr, SCORES_KINDS))}, got "
                f"{self.scores_kind!r}"
            )
        if self.function is not None and not callable(self.function):
            raise TypeError(
                "adapter must be a callable (batch, outputs, captured) -> RefineInputs or mapping, "
                f"got {type(self.function).__name__}"
            )

    def __call__(
        self, batch: Any, outputs: Any, captured: Tensor | None = None, seen: str = "nothing"
    ) -> RefineInputs:
        """Convert one batch.

        Args:
            batch: As the dataloader yields it, on its device.
            outputs: The step's output, may be None.
            captured: Scores captured by a forward hook during the step.
            seen: Description of what the hook captured, for the error.

        Raises:
            ValueError: A role was not found (the message lists the tensors there are), or does not
                fit: shapes, number of classes, value ranges.
            TypeError: A custom adapter returned something else.
        """
        return self.read(batch, outputs, captured, seen).inputs

    def read(
        self,
        batch: Any,
        outputs: Any,
        captured: Tensor | None = None,
        seen: str = "nothing",
        settled: Roles | None = None,
        calls: Sequence[NetworkCall] = (),
        rivals: Sequence[Found] = (),
    ) -> Reading:
        """Convert one batch, and return it with its sources.

        Args:
            batch: As in a call.
            outputs: As in a call.
            captured: As in a call.
            seen: As in a call.
            settled: Where the roles of an earlier batch were found; this batch's are read from
                the same places.
            calls: What the network was given, to check that it shows the batch's image.
            rivals: What else left the modules and may be the prediction, see `ScoresCapture`.

        Raises:
            MissingTargetError: Only the target is missing.
            WrongValuesError: The network's input was another view of the image.
            ValueError: As in a call.
            TypeError: As in a call.
        """
        kind = self.scores_kind
        found = batch if self.function is None else self.function(batch, outputs, captured)
        key = self.image_key if self.function is None else None
        slices = find_slices(found, key, self.slice_axis, self.rgb.shows)
        if slices is not None:
            found, batch, outputs, captured = map(slices.cut, (found, batch, outputs, captured))
            calls = rivals = ()  # the network was given volumes
        if self.function is not None:
            if isinstance(found, RefineInputs):
                if self.scores_kind == "multilabel":
                    raise TypeError(
                        "adapter must return a mapping with 'logits' or 'probs' and a multi-hot "
                        "'target' with scores_kind='multilabel', got RefineInputs"
                    )
                return Reading(self._checked(found), None, kind)
            roles, kind = unpack(found)
            roles = roles if self.needs_target else replace(roles, target=None)
        else:
            search = RoleSearch(
                self._num_classes,
                self.image_key,
                self.target_key,
                self.scores_key,
                kind,
                self.needs_target,
                self.rgb.shows,
            )
            if settled is None:
                roles = search(batch, outputs, captured, rivals)
            else:
                roles = search.again(settled, batch, outputs, captured)
        image, target, scores = roles.image, roles.target, roles.scores
        missing = [
            role
            for role, value in (("image", image), ("target", target), ("scores", scores))
            if value is None and (role != "target" or self.needs_target)
        ]
        if image is None or scores is None or missing:
            error = MissingTargetError if missing == ["target"] else ValueError
            raise error(self._not_found(missing, batch, outputs, seen))
        if self.function is None and self.scores_key is None:
            search.check_view(roles, calls)
        is_overlapping = self.scores_kind == "multilabel"
        kind = self._settled_kind(scores, kind, captured)
        padding = None
        if self.function is None:
            container = batch if image.source == "batch" else outputs
            padding = self.padding(container, image.value, image.source)
        returned = scores.source == "outputs" and self.scores_key is None
        tensors = FoundTensors(
            self._move(image.value),
            self._move(scores.value),
            None if target is None else self._move(target.value),
            self._move(captured) if returned else None,
        )
        converted = convert(tensors, kind, self._num_classes, self.rgb, padding, is_overlapping)
        parts = slices.names if slices is not None else ("",)
        if is_overlapping:
            parts = tuple(f"{part}/{c}".strip("/") for part in parts for c in self._class_names)
        inputs = RefineInputs(
            converted.images, converted.probs, converted.labels, converted.targets, parts
        )
        colors, has_probs = self.rgb.describe(image.value), converted.has_network_probs
        return Reading(inputs, roles, kind, has_probs, padding, colors, slices, is_overlapping)

    def _settled_kind(self, scores: Found, kind: ScoresKind, captured: Tensor | None) -> ScoresKind:
        """Return the kind of scores; that of a single map with overlapping classes.

        ``"auto"`` is left where the values of each image decide.
        """
        name = str(scores.path[-1]).lower() if scores.path else ""
        value = scores.value
        if kind == "multilabel":
            for known in ("logits", "probs"):
                if known.rstrip("s") in name:
                    return known
            try:
                return self.binary(scores_by_class(value), name)
            except WrongValuesError:
                raise
            except ValueError as error:
                raise ValueError(
                    "scores must be named 'logits' or 'probs' if those of overlapping classes lie "
                    f"in [0, 1], got {scores}"
                ) from error
        if kind == "auto" and self._num_classes == 2 and _has_one_channel(value):
            return self.binary(value, name, captured)
        if kind == "auto":
            refuse_unclear_sums(value, str(scores))
        return kind

    @property
    def _class_names(self) -> tuple[str, ...]:
        names = self.class_names or map(str, range(self._num_classes))
        return tuple(name.replace("/", "_") for name in names)

    @property
    def _num_classes(self) -> int:
        if self.num_classes is None:
            raise ValueError("num_classes must be the number of classes, got None")
        return self.num_classes

    def _not_found(self, missing: Sequence[str], batch: Any, outputs: Any, seen: str) -> str:
        keys = {"image": self.image_key, "target": self.target_key, "scores": self.scores_key}
        wanted = " and ".join(
            role if keys[role] is None else f"{role} under {role}_key={keys[role]!r}"
            for role in missing
        )
        queries = "scores" in missing and query_masks(outputs, self._num_classes)
        hint = f"The step returned {QUERIES}. " if queries else hint_at_missing(missing, batch)
        return (
            f"No {wanted} found. {hint}The batch is {describe(batch)}; the step returned "
            f"{describe(outputs)}; forward hooks saw {seen}. Scores are float "
            f"(B, {self.num_classes}, H, W), or integer (B, H, W) under a usual name. "
            "Return the scores from the step (such as {'logits': logits}), name what is there "
            f"(image_key, target_key, scores_key), or give an adapter."
        )

    def _move(self, value: Any) -> Any:
        """Move a tensor or a list of them to ``device``, if it is set; subclasses become plain."""
        if isinstance(value, Tensor):
            return plain(value if self.device is None else value.to(self.device))
        return None if value is None else list(map(self._move, value))

    def _checked(self, inputs: RefineInputs) -> RefineInputs:
        if inputs.targets is None and self.needs_target:
            raise ValueError("adapter must return targets here, got RefineInputs without them")
        inputs = replace(
            inputs,
            images=self._move(inputs.images),
            probs=self._move(inputs.probs),
            labels=self._move(inputs.labels),
            targets=self._move(inputs.targets),
        )
        check_shapes(inputs.images, inputs.probs, inputs.labels, inputs.targets, self._num_classes)
        return replace(
            inputs,
            images=_each(checked_image, inputs.images),
            probs=_each(checked_probs, inputs.probs),
            labels=_each(lambda labels: whole_numbers(labels, "adapter: labels"), inputs.labels),
            targets=None
            if inputs.targets is None
            else _each(lambda target: whole_numbers(target, "adapter: targets"), inputs.targets),
        )


def _has_one_channel(scores: Samples) -> bool:
    """Whether scores are (B, 1, h, w) or (B, h, w), or a list of these without B."""
    return all(one.ndim == 2 or (one.ndim == 3 and len(one) == 1) for one in scores)


def _each(function: Callable[[Tensor], Tensor], samples: Samples) -> Samples:
    return function(samples) if isinstance(samples, Tensor) else [function(one) for one in samples]
