"""Evidence for each class at each pixel, and the log-linear fusion that weighs it.

The score of class c at a pixel is Σ_f w_f · feature_f,c + b_c, and the refined probabilities are
the softmax of the scores. With the weights of `PRESET_WEIGHTS` and no biases this is the product of
the soft fusion: probabilities, color ratios and votes, multiplied.

The features are logarithms: ``"raw"`` of the raw probability, ``"color"`` of how usual the pixel's
color is in the class, ``"presence"`` of the class's mean probability in the image, and
``"region_votes"`` of the support by SAM's masks. Only the last needs SAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_samrefine.fusion_weights import FEATURES, LogLinear
from lightning_samrefine.refine.windows import WindowMaps

# Smallest value inside a logarithm.
_FLOORS = {"raw": 1e-4, "color": 1e-2, "presence": 1e-5}
# Added to votes. A region's mask was prompted with the prediction itself, so that its absence is
# weak evidence.
_OFFSET = 0.2


@dataclass(frozen=True)
class FeatureMaps:
    """What the features of one image are computed from, all on one device.

    Attributes:
        probs: (C, H, W) float32 in [0, 1], the raw probabilities.
        color_ratios: (C, B) float32, p(class | color) / p(class) for each color bin.
        color_bins: (H, W) integer in [0, B), each pixel's color bin.
        region_votes: (C, h, w) maps in [0, 1], votes of the masks of prompted regions.
    """

    probs: Tensor
    color_ratios: Tensor
    color_bins: Tensor
    region_votes: WindowMaps

    def at(self, pixels: Tensor) -> Tensor:
        """Return (F, C, N) float32, all of `FEATURES` at N positions in the flattened image."""
        num_classes = len(self.probs)
        out = self.probs.new_empty(len(FEATURES), num_classes, len(pixels))
        for row, name in enumerate(FEATURES):
            for c in range(num_classes):
                out[row, c] = self._values(name, c, pixels)
        return out

    def fuse(self, weights: LogLinear, rows: slice | None = None) -> Tensor:
        """Return the refined probabilities, (C, n, W) float32, summing to 1 over the classes.

        Args:
            weights: Of the features.
            rows: With start and stop; all H of them if None.

        Raises:
            ValueError: Weights of another number of classes.
        """
        if weights.num_classes != len(self.probs):
            raise ValueError(
                f"weights must be those of {len(self.probs)} classes, got {weights.num_classes}"
            )
        rows = rows or slice(0, self.probs.shape[1])
        scores = torch.empty_like(self.probs[:, rows], memory_format=torch.contiguous_format)
        for c, bias in enumerate(weights.biases):
            # One class at a time stays in a CPU's cache.
            score = scores[c].fill_(bias)
            for name, weight in zip(weights.features, weights.weights, strict=True):
                if weight:
                    score.add_(self._values(name, c, rows), alpha=weight)
        return scores.softmax(dim=0)

    @cached_property
    def _shares(self) -> list[Tensor]:
        """The mean probability of each class."""
        return [own.mean() for own in self.probs]

    def _values(self, name: str, c: int, where: slice | Tensor) -> Tensor:
        """Return one feature of one class, float32.

        Args:
            name: The feature.
            c: The class.
            where: Rows, with start and stop, or (N,) int64 indices into the flattened image.
        """
        probs = _taken(self.probs[c], where)
        if name == "raw":
            return probs.clamp(min=_FLOORS[name]).log_()
        if name == "presence":
            return self._shares[c].clamp(min=_FLOORS[name]).log().expand_as(probs)
        if name == "color":
            ratios = self.color_ratios[c].clamp(min=_FLOORS[name]).log_()
            return ratios[_taken(self.color_bins, where).long()]
        of_class = slice(c, c + 1)
        if isinstance(where, slice):
            votes = self.region_votes.rows(where, of_class)[0]
        else:
            everywhere = slice(0, self.probs.shape[1])
            votes = _taken(self.region_votes.rows(everywhere, of_class)[0], where)
        return votes.add_(_OFFSET).log_()


def _taken(plane: Tensor, where: slice | Tensor) -> Tensor:
    return plane[where] if isinstance(where, slice) else plane.reshape(-1)[where]


def class_scores(weights: LogLinear, features: Tensor) -> Tensor:
    """Return the (C, N) float64 scores of (F, C, N) features."""
    device = features.device
    of_features = torch.tensor(weights.weights, dtype=torch.float64, device=device)
    biases = torch.tensor(weights.biases, dtype=torch.float64, device=device)
    return torch.einsum("f,fcn->cn", of_features, features.double()) + biases[:, None]
