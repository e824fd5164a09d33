"""Whether two candidates for the scores give the same labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import Found, items
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.adapters.scores import ScoresKind, kind_of, to_probs

# Maximum share of pixels with different labels in tensors derived from the same scores: due to
# rounding, and due to another interpolation if one of them was resized.
_DIFFERING = 0.01
_DIFFERING_IN_SIZE = 0.05
# Maximum difference of two classes' probabilities whose order rounding to bfloat16 may swap.
_TIE = 0.05


@dataclass(frozen=True)
class ScoresAgreement:
    """Compares the labels of two candidates.

    Args:
        num_classes: C ≥ 2.
        kind: What the scores are.
    """

    num_classes: int
    kind: ScoresKind = "auto"

    def __call__(self, first: Found, second: Found, image: Found | None) -> bool:
        """Return whether two candidates give the same labels, except for rounding and resizing.

        Candidates of the same size may differ in ties only: a maximum share of all pixels would
        ignore small classes.

        Args:
            first: A candidate.
            second: Another one.
            image: The image, to whose size both are resized; None compares them as they are.
        """
        same_sizes = all(
            one.shape[-2:] == other.shape[-2:]
            for one, other in zip(items(first.value), items(second.value), strict=False)
        )
        differing = self.share_differing(first, second, image)
        if not same_sizes:
            return differing <= _DIFFERING_IN_SIZE
        return differing <= _DIFFERING and self.share_differing(first, second, image, _TIE) == 0

    def kind_of(self, value: Samples) -> str:
        """Return in words what scores are, see `lightning_samrefine.adapters.scores.kind_of`."""
        return kind_of(items(value)[0], self._kind(items(value)[0]))

    def _kind(self, value: Tensor) -> ScoresKind:
        """Return the kind of a candidate: integers are label maps, whatever the scores are."""
        is_label_map = self.kind != "multilabel" and not value.is_floating_point()
        return "labels" if is_label_map else self.kind

    def share_differing(
        self, first: Found, second: Found, image: Found | None, tie: float = -1.0
    ) -> float:
        """Return the share of pixels with different labels, in [0, 1].

        Args:
            first: A candidate.
            second: Another one.
            image: The image, to whose size both are resized; None compares them as they are.
            tie: Pixels whose two labels' probabilities differ by no more than this do not count;
                negative counts all.
        """
        sizes = [(item.shape[-2], item.shape[-1]) for item in items(image.value)] if image else []
        maps = [self._probs_and_labels(one.value, sizes) for one in (first, second)]
        hard = [self.kind_of(one.value) == "label map" for one in (first, second)]
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

    def _probs_and_labels(
        self, value: Samples, sizes: list[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (C, H, W) probabilities and (H, W) labels of each sample."""
        maps: list[tuple[Tensor, Tensor]] = []
        for index, item in enumerate(value):
            own_size = (item.shape[-2], item.shape[-1])
            size = sizes[min(index, len(sizes) - 1)] if sizes else own_size
            probs, labels = to_probs(item[None], self._kind(item), self.num_classes, size)
            maps += zip(probs, labels, strict=True)  # several of overlapping classes
        return maps


def _is_tie(probs: Tensor, labels: Tensor, other: Tensor, tie: float) -> Tensor:
    """Whether two labels of each pixel, both (H, W), are about as likely, (H, W) bool."""
    both = torch.stack([labels, other]).clamp(0, len(probs) - 1)
    first, second = probs.gather(0, both)
    return (first - second).abs() <= tie
