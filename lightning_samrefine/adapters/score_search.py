"""Which tensor of a step's output, a forward hook or a batch holds the scores."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import (
    HOOK_KEY,
    IMAGE_NAMES,
    TARGET_NAMES,
    Found,
    ambiguous,
    distinct,
    has_pixels,
    is_copy,
    is_image,
    is_target,
    items,
    of,
    shares_memory,
)
from lightning_samrefine.adapters.nested import Leaf, Samples, at_key, leaves, named
from lightning_samrefine.adapters.scores import (
    ScoresKind,
    has_whole_stride,
    is_score_map,
    kind_of,
    one_hot_labels,
    to_probs,
)

SCORES_NAMES = (
    "logits", "probs", "probabilities", "scores", "preds", "pred", "predictions", "prediction",
    "out", "output", "outputs", "y_hat", "y_pred", "masks_pred", "pred_masks",
)  # fmt: skip
# Names that no map of distances has.
_CERTAIN_NAMES = ("logits", "scores")

# A tensor under such a name is something else, however much its shape is that of scores.
_OTHER = re.compile(
    r"loss|uncert|entrop|varian|std|weight|dist|sdf|edge|bound|contour|depth|flow|feat|embed|"
    r"atten|attn|heat|error|valid|ignore|recon|normal|aux|teacher"
)
_IMAGE_OR_TARGET = re.compile(r"image|img|pixel|rgb|mask|target|label|truth|annot|^gt|_gt")
_SCORES = re.compile(r"logit|prob|score|pred")

# In a step's output, what holds the target, or whole numbers that are no classes.
_NO_CLASSES = re.compile(
    r"target|truth|label|annot|^gt|_gt|^y|inst|superpix|slic|cluster|component|index|idx|rank|"
    r"(^|_)ids?($|_)|correct|wrong|hit|miss|diff|chang|agree|^[tf][pn]$"
)

# Share of pixels in which two tensors made of the same scores may differ in their labels: by
# rounding, and where one of them was enlarged in another way.
_DIFFERING = 0.01
_DIFFERING_IN_SIZE = 0.05
# Difference of two classes' probabilities that rounding to bfloat16 may turn around.
_TIE = 0.05

QUERIES = (
    "class scores and masks of queries (as Mask2Former and MaskFormer return them), which are no "
    "scores of classes: post-process them in the step and return {'logits': …}, or give an adapter"
)


@dataclass(frozen=True)
class ScoresSearch:
    """Finds scores.

    Args:
        num_classes: C ≥ 2.
        key: Where the user says that they are, None to search.
        kind: What they are.
    """

    num_classes: int
    key: str | None = None
    kind: ScoresKind = "auto"

    def __call__(
        self,
        batch: Any,
        outputs: Any,
        captured: Tensor | None,
        image: Found | None,
        target: Found | None,
    ) -> Found | None:
        """Search one batch.

        Args:
            batch: As the dataloader yields it.
            outputs: What the step returned.
            captured: What a forward hook saw.
            image: The image, which scores must fit and cannot be.
            target: The target, which scores cannot be.

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

        # What has not the shape of its role is refused where it is converted.
        image = image if image is not None and is_image(image.value) else None
        target = target if target is not None and is_target(target.value) else None
        given = [one.value for one in (image, target) if one is not None]
        queries = query_masks(outputs, self.num_classes)
        singles = _single_samples(outputs)

        def possible(found: Found) -> bool:
            return (
                _fits_scores(found.value, self.num_classes)
                and not any(found.value is mask for mask in (*queries, *singles))
                and (image is None or not is_copy(found.value, image.value))
                and not any(shares_memory(found.value, one) for one in given)
                and _belongs_to(found.value, image)
            )

        hooked = [hook] if hook is not None and possible(hook) else []
        by_name = [one for one in of("outputs", named(outputs, SCORES_NAMES)) if possible(one)]
        if target is not None and hooked:
            # A perfect prediction equals the target as well, but so does the network's.
            for one in by_name:
                if is_copy(one.value, target.value) and not self.agree(one, hooked[0], image):
                    ambiguous("scores", [one, hooked[0]])
        unnamed = [] if by_name else self._unnamed(outputs, target, possible)
        # A hook tells a perfect prediction from a copy of the target.
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
            for one in self._label_maps(outputs, target, possible):
                self._checked_by_hook(one, hooked[0], image)
        else:
            in_batch = [one for one in of("batch", named(batch, SCORES_NAMES)) if possible(one)]
            weak = distinct([*(unnamed if len(unnamed) == 1 else []), *in_batch])
            if not weak:
                # What is named right but shaped wrong gets an error about its shape.
                bare = [Leaf((), outputs)] if isinstance(outputs, Tensor) else []
                bare = [one for one in bare if _fits_scores(one.value, self.num_classes)]
                misfits = [
                    one
                    for one in of("outputs", [*named(outputs, SCORES_NAMES), *bare])
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
        """Choose between a step's only tensor and what left the network.

        A label map stands: where it is the argmax of the network's scores, `to_probs` takes their
        probabilities, image by image. Scores that were enlarged by the step are what the user
        measures.
        """
        if self._kind(bare.value) == "label map":
            return bare
        return self._checked_by_hook(bare, hooked, image)

    def _checked_by_hook(self, returned: Found, hooked: Found, image: Found | None) -> Found:
        """Refuse what contradicts the network."""
        if not self.agree(returned, hooked, image):
            ambiguous("scores", [returned, hooked])
        return returned

    def _telling(
        self, outputs: Any, target: Found | None, possible: Callable[[Found], bool]
    ) -> list[Found]:
        """Return tensors whose names speak of scores, as ``seg_logits`` and ``pred_mask`` do."""
        return [
            one
            for one in of("outputs", leaves(outputs))
            if one.path
            and _SCORES.search(str(one.path[-1]).lower())
            and not _is_something_else(one.path)
            and possible(one)
            and (target is None or not self._is_target_copy(one.value, target.value))
        ]

    def _label_maps(
        self, outputs: Any, target: Found | None, possible: Callable[[Found], bool]
    ) -> list[Found]:
        """Return maps of whole numbers that may be the step's prediction, under an open name.

        A step that smooths or otherwise changes the classes returns such a map and a loss.
        """
        return [
            one
            for one in of("outputs", leaves(outputs))
            if one.path
            and isinstance(one.value, Tensor)
            and not one.value.is_floating_point()
            and is_target(one.value)
            and _may_hold_classes(one.path)
            and possible(one)
            and self._holds_classes(one.value)
            and (target is None or not _equals_where_known(one.value, target.value))
        ]

    def _holds_classes(self, value: Tensor) -> bool:
        """Whether whole numbers are classes and what usually stands for none, 255 and -1."""
        if value.dtype == torch.bool:
            return self.num_classes == 2
        labels = value.long()
        known = ((labels >= 0) & (labels < self.num_classes)) | (labels == 255) | (labels == -1)
        return bool(known.all())

    def _unnamed(
        self, outputs: Any, target: Found | None, possible: Callable[[Found], bool]
    ) -> list[Found]:
        """Return tensors whose shape and values are those of scores, and whose name is open."""
        found = [
            one
            for one in of("outputs", leaves(outputs))
            if isinstance(one.value, Tensor)
            and (is_score_map(one.value, self.num_classes) or not one.path)
            and not _is_something_else(one.path)
            and possible(one)
            and (target is None or not self._is_target_copy(one.value, target.value))
        ]
        return [one for one in found if not one.path or _is_signed_or_probs(one.value)]

    def _is_target_copy(self, value: Tensor, target: Samples) -> bool:
        hard = one_hot_labels(value)
        return is_copy(value, target) or (hard is not None and is_copy(hard, target))

    def _most_informative(self, candidates: list[Found], image: Found | None) -> Found:
        """Choose among tensors that agree: the shallowest, scores rather than label maps."""
        depth = min(len(one.path) for one in candidates)
        shallow = distinct(one for one in candidates if len(one.path) == depth)
        for first, second in combinations(shallow, 2):
            if not self.agree(first, second, image):
                ambiguous("scores", shallow)
        soft = [one for one in shallow if self._kind(one.value) != "label map"]
        return (soft or shallow)[0]

    def _kind(self, value: Samples) -> str:
        return kind_of(items(value)[0], self.kind)

    def agree(self, first: Found, second: Found, image: Found | None) -> bool:
        """Whether two candidates name the same classes, but for rounding and resizing.

        Of one size they differ in ties alone: a share of all pixels says nothing of small classes.
        """
        same = all(
            one.shape[-2:] == other.shape[-2:]
            for one, other in zip(items(first.value), items(second.value), strict=False)
        )
        if not same:
            return self._share_differing(first, second, image) <= _DIFFERING_IN_SIZE
        ties = self._share_differing(first, second, image)
        return ties <= _DIFFERING and self._share_differing(first, second, image, _TIE) == 0

    def _share_differing(
        self, first: Found, second: Found, image: Found | None, tie: float = -1.0
    ) -> float:
        """Return the share of pixels whose labels differ, ties of probabilities left out."""
        sizes = [tuple(item.shape[-2:]) for item in items(image.value)] if image else []
        maps = [self._read(one.value, sizes) for one in (first, second)]
        hard = [self._kind(one.value) == "label map" for one in (first, second)]
        pixels = differing = 0
        for (probs, labels), (other_probs, other) in zip(*maps, strict=True):
            other, other_probs = other.to(labels.device), other_probs.to(labels.device)
            clear = labels != other
            for is_hard, one in zip(hard, (probs, other_probs), strict=True):
                if not is_hard:
                    clear &= ~_is_tie(one, labels, other, tie)
            pixels += labels.numel()
            differing += int(clear.sum())
        return differing / max(pixels, 1)

    def _read(self, value: Samples, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Return (C, H, W) probabilities and (H, W) labels of each sample."""
        maps = []
        for index, item in enumerate(value):
            size = sizes[min(index, len(sizes) - 1)] if sizes else tuple(item.shape[-2:])
            probs, labels = to_probs(item[None], self.kind, self.num_classes, size)
            maps.append((probs[0], labels[0]))
        return maps

    def _check_signs(self, scores: Found) -> None:
        """Refuse distances: logits have negative values, probabilities none above 1."""
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


def network_scores(outputs: Any, num_classes: int) -> list[Leaf]:
    """Return what may be a network's scores, float (B, C, H, W); one where it is clear.

    A usual name such as ``"out"`` of torchvision's networks and ``"logits"`` of transformers'
    comes before a single tensor of that shape. A network has no targets to return: ``"mask"`` and
    the like are its prediction.
    """
    queries = query_masks(outputs, num_classes)

    def fits(leaf: Leaf) -> bool:
        return (
            isinstance(leaf.value, Tensor)
            and is_score_map(leaf.value, num_classes)
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
            or not _is_something_else(leaf.path)
        )
    ]


def query_masks(outputs: Any, num_classes: int) -> list[Tensor]:
    """Return masks of queries: (B, Q, h, w) beside class scores (B, Q, K) of the same queries."""
    found = [leaf for leaf in leaves(outputs) if isinstance(leaf.value, Tensor)]
    classes = [leaf for leaf in found if leaf.value.ndim == 3 and leaf.value.is_floating_point()]
    return [
        mask.value
        for mask in found
        if mask.value.ndim == 4
        and any(
            one.path[:-1] == mask.path[:-1]
            and one.value.shape[:2] == mask.value.shape[:2]
            and (
                one.value.shape[2] == num_classes + 1
                or re.search("class|logit", str(one.path[-1]).lower())
            )
            for one in classes
        )
    ]


def _belongs_to(scores: Samples, image: Found | None) -> bool:
    """Whether scores have an image's number of samples, and its size or that over a stride."""
    if image is None:
        return True
    if len(scores) != len(image.value):
        return False
    return all(
        has_whole_stride(tuple(one.shape[-2:]), tuple(other.shape[-2:]))
        for one, other in zip(scores, image.value, strict=True)
    )


def _single_samples(outputs: Any) -> list[Tensor]:
    """Return (C, H, W) tensors of a list with an entry for each sample, which are no batches."""
    found = [
        leaf
        for leaf in leaves(outputs)
        if isinstance(leaf.value, Tensor)
        and leaf.value.ndim == 3
        and len(leaf.path) > 1
        and isinstance(leaf.path[0], int)
    ]
    tails = [leaf.path[1:] for leaf in found]
    return [leaf.value for leaf in found if tails.count(leaf.path[1:]) > 1]


def _is_tie(probs: Tensor, labels: Tensor, other: Tensor, tie: float) -> Tensor:
    """Whether two labels of each pixel, both (H, W), are about as likely, (H, W) bool."""
    both = torch.stack([labels, other]).clamp(0, len(probs) - 1)
    first, second = probs.gather(0, both)
    return (first - second).abs() <= tie


def _may_hold_classes(path: tuple[str | int, ...]) -> bool:
    name = str(path[-1]).lower()
    return name not in IMAGE_NAMES and not _OTHER.search(name) and not _NO_CLASSES.search(name)


def _equals_where_known(value: Tensor, target: Samples) -> bool:
    """Whether a map is the target, whatever it holds where the target's pixels are not known."""
    if not isinstance(target, Tensor):
        return is_copy(value, target)
    maps = [one[:, 0] if one.ndim == 4 else one for one in (value.cpu().long(), target.cpu())]
    if maps[0].shape != maps[1].shape:
        return False
    known = (maps[1] != 255) & (maps[1] >= 0)
    return bool((maps[0] == maps[1])[known].all())


def _is_something_else(path: tuple[str | int, ...]) -> bool:
    name = str(path[-1]).lower() if path else ""
    if _OTHER.search(name):
        return True
    if name in IMAGE_NAMES or name in TARGET_NAMES:
        return True
    return bool(_IMAGE_OR_TARGET.search(name)) and not _SCORES.search(name)


def _is_signed_or_probs(value: Tensor) -> bool:
    """Whether values are of both signs, as logits, or those of probabilities or label maps."""
    return bool((value < 0).any()) or not kind_of(value, "auto").startswith("logits")


def _fits_scores(value: Samples, num_classes: int) -> bool:
    """Whether a value under a usual name can be scores: label maps and binary maps included."""
    return all(
        is_score_map(item, num_classes)
        or (item.ndim == 4 and item.shape[1] == num_classes and one_hot_labels(item) is not None)
        or (
            is_target(item)
            and (not item.is_floating_point() or (num_classes == 2 and item.ndim == 3))
        )
        for item in items(value)
    )
