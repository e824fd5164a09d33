"""Finds the scores in a step's output, a forward hook or a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import (
    HOOK_KEY,
    IMAGE_NAMES,
    Found,
    ambiguous,
    distinct,
    has_pixels,
    is_copy,
    is_target,
    items,
    of,
    shares_memory,
)
from lightning_samrefine.adapters.layouts.overlapping import is_multi_hot
from lightning_samrefine.adapters.nested import Leaf, Samples, at_key, leaves, named
from lightning_samrefine.adapters.network_scores import (
    OTHER_PATTERN,
    SCORES_NAMES,
    SCORES_PATTERN,
    is_something_else,
    query_masks,
    tensors,
)
from lightning_samrefine.adapters.score_agreement import ScoresAgreement
from lightning_samrefine.adapters.scores import (
    ScoresKind,
    has_whole_stride,
    is_score_map,
    kind_of,
    one_hot_labels,
)

# Names that distance maps never have.
_CERTAIN_NAMES = ("logits", "scores")

# Names in a step's output of targets and of integers that are not classes.
_NO_CLASSES = re.compile(
    r"target|truth|label|annot|^gt|_gt|^y|inst|superpix|slic|cluster|component|index|idx|rank|"
    r"(^|_)ids?($|_)|correct|wrong|hit|miss|diff|chang|agree|^[tf][pn]$"
)


@dataclass(frozen=True)
class ScoresSearch:
    """Finds scores.

    Args:
        num_classes: C ≥ 2.
        key: The user's key, None to search.
        kind: Kind of scores.
    """

    num_classes: int
    key: str | None = None
    kind: ScoresKind = "auto"

    @property
    def _agreement(self) -> ScoresAgreement:
        return ScoresAgreement(self.num_classes, self.kind)

    def __call__(
        self,
        batch: Any,
        outputs: Any,
        captured: Tensor | None,
        image: Found | None,
        target: Found | None,
        rivals: Sequence[Found] = (),
    ) -> Found | None:
        """Search one batch.

        Args:
            batch: As the dataloader yields it.
            outputs: The step's output.
            captured: Scores captured by a forward hook.
            image: The image: scores must fit its size and be another tensor.
            target: The target: scores must be another tensor.
            rivals: What else left the modules and may be the prediction.

        Raises:
            ValueError: Several tensors give different labels, or the only one cannot be scores.
        """
        hook = None if captured is None else Found("forward", (), captured)
        if self.key is not None:
            by_key = [
                *of("outputs", [at_key(outputs, self.key)]),
                *of("batch", [at_key(batch, self.key)]),
                *([hook] if hook and self.key == HOOK_KEY else []),
            ]
            return by_key[0] if by_key else None

        given = [one.value for one in (image, target) if one is not None]
        queries = query_masks(outputs, self.num_classes)
        singles = _single_samples(outputs)

        def possible(found: Found) -> bool:
            return (
                _fits_scores(found.value, self.num_classes, self.kind)
                and not any(found.value is mask for mask in (*queries, *singles))
                and (image is None or not is_copy(found.value, image.value))
                and not any(shares_memory(found.value, one) for one in given)
                and _belongs_to(found.value, image)
            )

        hooked = [hook] if hook is not None and possible(hook) else []
        by_name = [one for one in of("outputs", named(outputs, SCORES_NAMES)) if possible(one)]
        if target is not None and hooked:
            # If a prediction equals the target because it is perfect, so does the network's.
            for one in by_name:
                if is_copy(one.value, target.value) and not self._agreement(one, hooked[0], image):
                    ambiguous("scores", [one, hooked[0]])
        unnamed = [] if by_name else self._unnamed(outputs, target, possible)
        # With a hook, a perfect prediction can be distinguished from a copy of the target.
        telling = [] if by_name else self._telling(outputs, None if hooked else target, possible)
        if by_name:
            chosen = self._most_informative(by_name, image)
        elif telling:
            chosen = self._most_informative(telling, image)
            if hooked:
                chosen = self._checked_by_hook(chosen, hooked[0], image)
        elif hooked:
            bare = [one for one in unnamed if not one.path]
            chosen = self._bare_or_hooked(bare[0], hooked[0], image) if bare else hooked[0]
            others = self._label_maps(of("outputs", leaves(outputs)), target, possible)
            if chosen is hooked[0]:
                soft = (one for one in rivals if items(one.value)[0].is_floating_point())
                others += [*filter(possible, soft), *self._label_maps(rivals, target, possible)]
            for one in others:
                self._checked_by_hook(one, hooked[0], image)
        else:
            in_batch = [one for one in of("batch", named(batch, SCORES_NAMES)) if possible(one)]
            weak = distinct([*(unnamed if len(unnamed) == 1 else []), *in_batch])
            if not weak:
                # A usual name with an unsuitable shape: the conversion raises about the shape.
                sole = [Leaf((), outputs)] if isinstance(outputs, Tensor) else []
                sole = [
                    leaf for leaf in sole if _fits_scores(leaf.value, self.num_classes, self.kind)
                ]
                misfits = [
                    one
                    for one in of("outputs", [*named(outputs, SCORES_NAMES), *sole])
                    if has_pixels(one.value)
                    and not any(one.value is mask for mask in (*queries, *singles))
                    and not any(is_copy(one.value, value) for value in given)
                ]
                misfit = [*misfits, *([hook] if hook is not None else [])]
                return misfit[0] if misfit else None
            chosen = self._most_informative(weak, image)
        self._check_signs(chosen)
        return chosen

    def _bare_or_hooked(self, bare: Found, hooked: Found, image: Found | None) -> Found:
        """Choose between a step's only tensor and the network's output.

        A label map is chosen: if it is the argmax of the network's scores, their probabilities are
        added later, image by image. Scores resized by the step are chosen over the network's: the
        user evaluates these.
        """
        if self._agreement.kind_of(bare.value) == "label map":
            return bare
        return self._checked_by_hook(bare, hooked, image)

    def _checked_by_hook(self, returned: Found, hooked: Found, image: Found | None) -> Found:
        """Raise if a tensor disagrees with the network."""
        if not self._agreement(returned, hooked, image):
            ambiguous("scores", [returned, hooked])
        return returned

    def _telling(
        self, outputs: Any, target: Found | None, possible: Callable[[Found], bool]
    ) -> list[Found]:
        """Return tensors with names that contain one of scores: ``seg_logits``, ``pred_mask``."""
        return [
            one
            for one in of("outputs", leaves(outputs))
            if one.path
            and SCORES_PATTERN.search(str(one.path[-1]).lower())
            and not is_something_else(one.path)
            and possible(one)
            and (target is None or not self._is_target_copy(one.value, target.value))
        ]

    def _label_maps(
        self,
        candidates: Iterable[Found],
        target: Found | None,
        possible: Callable[[Found], bool],
    ) -> list[Found]:
        """Return integer maps that may be the step's prediction, under any other name.

        A step that smooths or otherwise changes the classes returns such a map and a loss.
        """
        return [
            one
            for one in candidates
            if (one.path or one.source != "outputs")
            and isinstance(one.value, Tensor)
            and not one.value.is_floating_point()
            and is_target(one.value)
            and _may_hold_classes(one.path)
            and possible(one)
            and self._holds_classes(one.value)
            and (target is None or not _equals_where_known(one.value, target.value))
        ]

    def _holds_classes(self, value: Tensor) -> bool:
        """Whether integers are class indices, or 255 and -1, the usual values for none."""
        if value.dtype == torch.bool:
            return self.num_classes == 2
        labels = value.long()
        known = ((labels >= 0) & (labels < self.num_classes)) | (labels == 255) | (labels == -1)
        return bool(known.all())

    def _unnamed(
        self, outputs: Any, target: Found | None, possible: Callable[[Found], bool]
    ) -> list[Found]:
        """Return tensors with the shape and values of scores, under any other name."""
        found = [
            one
            for one in of("outputs", leaves(outputs))
            if isinstance(one.value, Tensor)
            and (is_score_map(one.value, self.num_classes) or not one.path)
            and not is_something_else(one.path)
            and possible(one)
            and (target is None or not self._is_target_copy(one.value, target.value))
        ]
        return [one for one in found if not one.path or _are_signed_or_probs(one.value)]

    def _is_target_copy(self, value: Samples, target: Samples) -> bool:
        """Whether a value is the target, or its one-hot form."""
        if not isinstance(value, Tensor) or not isinstance(target, Tensor):
            return len(value) == len(target) and all(
                self._is_target_copy(one[None], truth[None])
                for one, truth in zip(value, target, strict=True)
            )
        hard = one_hot_labels(value)
        return is_copy(value, target) or (hard is not None and is_copy(hard, target))

    def _most_informative(self, candidates: list[Found], image: Found | None) -> Found:
        """Choose among tensors that agree: the least nested, scores rather than label maps."""
        depth = min(len(one.path) for one in candidates)
        shallow = distinct(one for one in candidates if len(one.path) == depth)
        for first, second in combinations(shallow, 2):
            if not self._agreement(first, second, image):
                ambiguous("scores", shallow)
        soft = [one for one in shallow if self._agreement.kind_of(one.value) != "label map"]
        return (soft or shallow)[0]

    def _check_signs(self, scores: Found) -> None:
        """Raise for distances: logits have negative values, probabilities none above 1."""
        certain = scores.path and str(scores.path[-1]).lower() in _CERTAIN_NAMES
        if self.kind != "auto" or certain:
            return
        for item in items(scores.value):
            if not item.is_floating_point() or item.numel() == 0:
                continue
            low, high = torch.stack(torch.aminmax(item.float())).tolist()
            if low == 0 and high > 1 and float((item == 0).float().mean()) > 0.01:
                raise ValueError(
                    f"scores must be logits, probabilities or label maps, got values from 0 to "
                    f"{high:.4g}, none below 0, in {scores}: a map of distances or an activation. "
                    "Set scores_kind='logits' if they are logits, or name the scores with "
                    "scores_key"
                )


def _belongs_to(scores: Samples, image: Found | None) -> bool:
    """Whether scores have an image's number of samples, and its size, possibly over a stride."""
    if image is None:
        return True
    if len(scores) != len(image.value):
        return False
    return all(
        has_whole_stride(tuple(one.shape[-2:]), tuple(other.shape[-2:]))
        for one, other in zip(scores, image.value, strict=True)
    )


def _single_samples(outputs: Any) -> list[Tensor]:
    """Return the (C, H, W) tensors of a list with one entry per sample: they are not batches."""
    found = [
        (path[1:], one)
        for path, one in tensors(outputs)
        if one.ndim == 3 and len(path) > 1 and isinstance(path[0], int)
    ]
    tails = [tail for tail, _ in found]
    return [one for tail, one in found if tails.count(tail) > 1]


def _may_hold_classes(path: tuple[str | int, ...]) -> bool:
    name = str(path[-1]).lower() if path else ""
    if name in ("label", "labels"):  # as likely a prediction as a target
        return True
    return (
        name not in IMAGE_NAMES and not OTHER_PATTERN.search(name) and not _NO_CLASSES.search(name)
    )


def _equals_where_known(value: Tensor, target: Samples) -> bool:
    """Whether a map equals the target at all pixels whose target is known."""
    if not isinstance(target, Tensor):
        return is_copy(value, target)
    maps = [one[:, 0] if one.ndim == 4 else one for one in (value.cpu().long(), target.cpu())]
    if maps[0].shape != maps[1].shape:
        return False
    known = (maps[1] != 255) & (maps[1] >= 0)
    return bool((maps[0] == maps[1])[known].all())


def _are_signed_or_probs(samples: Samples) -> bool:
    """Whether values are partly negative, like logits, or those of probabilities or label maps."""
    return all(
        bool((value < 0).any()) or not kind_of(value, "auto").startswith("logits")
        for value in items(samples)
    )


def _fits_scores(value: Samples, num_classes: int, kind: ScoresKind) -> bool:
    """Whether a value under a usual name can be scores, including label maps and binary maps."""
    if kind == "multilabel":
        return is_multi_hot(value, num_classes)
    return all(
        is_score_map(item, num_classes)
        or (item.ndim == 4 and item.shape[1] == num_classes and one_hot_labels(item) is not None)
        or (
            is_target(item)
            and (not item.is_floating_point() or (num_classes == 2 and item.ndim == 3))
        )
        for item in items(value)
    )
