"""Whether a network's input was the batch's image or another view of it (flip, crop, padding).

Scores of another view do not correspond to the pixels of the batch's target, even if their size is
the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lightning_samrefine.adapters.nested import Samples, leaves

# Channels of a network's input that may be an image: gray, RGB, one more channel, two images.
CHANNELS = frozenset((1, 3, 4, 6))
# Number of samples of a batch that are compared.
_SAMPLES = 4
# Side of the grid that both images are averaged over: sizes and single pixels may differ.
_GRID = 16
# Minimum share of the best channel's variance explained by a linear map of the image's colors:
# close to 1 for a normalized, gray, resized or brightened image, small for a cropped one.
_EXPLAINED = 0.8
# Minimum unexplained share for which flips and rotations are considered: a flipped view of a
# symmetric image is explained nearly as well as the image itself.
_SYMMETRIC = 1e-3
# Padding and cropping leave pixels unchanged; resizing does not.
_UNCHANGED, _RESIZED = 1e-4, 1e-3
# Standard deviation, as a share of the largest value, below which an image has no orientation.
_FLAT = 0.02
_SIDE = 128  # pixels compared along a side if sizes differ

CROPPED = "padded or cropped"
_UNLIKE = "cropped, or of other content"

TURNS = {
    "flipped left to right": lambda x: x.flip(-1),
    "flipped upside down": lambda x: x.flip(-2),
    "turned by 180°": lambda x: x.flip(-1, -2),
    "turned by 90°": lambda x: x.rot90(1, (-2, -1)),
    "turned by 270°": lambda x: x.rot90(3, (-2, -1)),
    "transposed": lambda x: x.transpose(-1, -2),
    "transposed and turned by 180°": lambda x: x.transpose(-1, -2).flip(-1, -2),
}


@dataclass(frozen=True)
class NetworkCall:
    """Scores that a network returned, (B, C, h, w), and what it was given, see `difference`."""

    scores: Tensor
    given: Sequence[Sequence[Samples]]


def images_in(values: Sequence[Any], channels: Set[int] = CHANNELS) -> list[Samples]:
    """Return possible images among a module's arguments: (B, c, h, w), or B × (c, h, w)."""
    found = [leaf.value for value in values for leaf in leaves(value, (0,))]
    return [one for one in found if all(x.ndim == 3 and len(x) in channels for x in _each(one))]


def difference(given: Sequence[Sequence[Samples]], image: Samples) -> str | None:
    """Describe how a network's input view differs from the batch's image.

    Args:
        given: Inputs of the network, in groups: each group was computed from the next one by
            another module, and one matching group is enough.
        image: (B, c, H, W), or B × (c, H, W).

    Returns:
        None if it is the same view, in any colors and size, or if it cannot be determined: no
        image among the inputs, another number of samples, or images of one color.
    """
    for group in given:
        found = [_difference(one, image) for one in group]
        if None in found:
            return None
        # A tensor unlike the image may be features, computed from the image by an earlier module.
        clear = [one for one in found if one != _UNLIKE]
        if clear:
            return clear[0]
    return _UNLIKE if given else None


def recolors(made: Tensor, given: Samples) -> bool:
    """Whether a tensor is a linear map of an image's colors, as a normalized image is."""
    if not isinstance(given, Tensor) or made.shape != given.shape or len(made) == 0:
        return False
    pair = [_thinned(_on_cpu(one[0])) for one in (made, given)]
    if not all(bool(one.isfinite().all()) for one in pair):
        return False
    explained = _explained(*pair)
    return explained is not None and 1 - explained < _UNCHANGED


def turned_back(maps: Tensor, view: str) -> Tensor | None:
    """Undo a flip or rotation that `difference` described, None for other differences.

    Args:
        maps: (B, C, h, w), or any other maps.
        view: The description.
    """
    opposite = {"turned by 90°": "turned by 270°", "turned by 270°": "turned by 90°"}
    turn = TURNS.get(opposite.get(view, view))
    return None if turn is None else turn(maps)


def _difference(given: Samples, image: Samples) -> str | None:
    if len(given) != len(image):
        return None
    pairs = zip(given[:_SAMPLES], image[:_SAMPLES], strict=True)
    verdicts = (_of_sample(*map(_on_cpu, pair)) for pair in pairs)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _of_sample(given: Tensor, image: Tensor) -> str | None:
    if not bool(given.isfinite().all() & image.isfinite().all()):
        return None
    grid, of_image = (
        nnf.interpolate(x[None], (_GRID, _GRID), mode="area")[0] for x in (given, image)
    )
    if float(of_image.std(dim=(1, 2)).max()) <= _FLAT * float(image.abs().max()):
        return None
    if given.shape[1:] != image.shape[1:] and _is_padded_or_cropped(given, image):
        return CROPPED
    explained = _explained(grid, of_image)
    if explained is None:
        return None
    turned = {name: _explained(grid, turn(of_image)) or 0.0 for name, turn in TURNS.items()}
    best = max(turned, key=turned.__getitem__)
    if turned[best] >= _EXPLAINED and 1 - explained > max(_SYMMETRIC, 2 * (1 - turned[best])):
        return best
    return None if explained >= _EXPLAINED else _UNLIKE


def _is_padded_or_cropped(given: Tensor, image: Tensor) -> bool:
    """Whether the image lies unchanged at a corner or in the middle of the input, or vice versa."""
    resized = nnf.interpolate(image[None], given.shape[1:], mode="bilinear")[0]
    as_resized = _explained(_thinned(given), _thinned(resized))
    if as_resized is None or 1 - as_resized < _RESIZED:
        return False
    sizes = zip(given.shape[1:], image.shape[1:], strict=True)
    for rows, columns in product(*(list(_overlaps(*size)) for size in sizes)):
        parts = (given[:, rows[0], columns[0]], image[:, rows[1], columns[1]])
        explained = _explained(*map(_thinned, parts))
        if explained is not None and 1 - explained < _UNCHANGED:
            return True
    return False


def _overlaps(given: int, image: int) -> Iterator[tuple[slice, slice]]:
    """Yield the overlaps of a side of the input and of the image: at start, middle and end."""
    length, spare = min(given, image), abs(given - image)
    for offset in sorted({0, spare // 2, spare}):
        shifted, whole = slice(offset, offset + length), slice(0, length)
        yield (shifted, whole) if given > image else (whole, shifted)


def _explained(given: Tensor, image: Tensor) -> float | None:
    """Return the share of a channel's variance that is explained by the image's colors.

    Args:
        given: (c, h, w) float32; its best-explained channel counts.
        image: (k, h, w) float32.

    Returns:
        1 if a channel is a linear map of the image's; None if every channel is constant.
    """
    values, colors = (x.flatten(1).T.double() for x in (given, image))
    values = values - values.mean(dim=0)
    colors = colors - colors.mean(dim=0)
    total = values.square().sum(dim=0)
    varies = total.sqrt() > 1e-6 * given.abs().max() * len(values) ** 0.5
    if not bool(varies.any()):
        return None
    fit = torch.linalg.lstsq(colors, values, driver="gelsd").solution
    rest = (values - colors @ fit).square().sum(dim=0)
    return float((1 - rest[varies] / total[varies]).max())


def _thinned(x: Tensor) -> Tensor:
    step = max(1, max(x.shape[1:]) // _SIDE)
    return x[:, ::step, ::step]


def _on_cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().float()


def _each(samples: Samples) -> Samples:
    """Return samples; one is enough if they are a batched tensor."""
    return samples[:1] if isinstance(samples, Tensor) else samples
