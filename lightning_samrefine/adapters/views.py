"""Whether a network was given the batch's image, or another view of it: flipped, cropped, padded.

Scores of another view have nothing to do with the pixels of the batch's target, and their size need
not show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lightning_samrefine.adapters.nested import Samples, leaves

# Channels of a network's input that may be an image: grey, RGB, one more channel, two images.
_CHANNELS = (1, 3, 4, 6)
# Samples of a batch that are looked at.
_SAMPLES = 4
# Side of the grid that both are averaged over: sizes and single pixels may differ.
_GRID = 16
# Share of the variance of the best channel that a linear map of the image's colors explains: of a
# normalized, grey, resized or brightened image nearly all, of one that is cropped little.
_EXPLAINED = 0.8
# Unexplained share from which on an image turned in another way may explain more: flipped, a
# symmetric image is explained nearly as well as the way it is.
_SYMMETRIC = 1e-3
# Padding and cropping leave pixels as they are; resizing does not.
_UNCHANGED, _RESIZED = 1e-4, 1e-3
# Standard deviation, as a share of the largest value, below which an image shows no direction.
_FLAT = 0.02
_SIDE = 128  # pixels compared along a side where sizes differ

_UNLIKE = "cropped, or of other content"

_TURNED = {
    "flipped left to right": lambda x: x.flip(-1),
    "flipped upside down": lambda x: x.flip(-2),
    "turned by 180°": lambda x: x.flip(-1, -2),
    "turned by 90°": lambda x: x.rot90(1, (-2, -1)),
    "turned by 270°": lambda x: x.rot90(3, (-2, -1)),
    "transposed": lambda x: x.transpose(-1, -2),
    "transposed and turned by 180°": lambda x: x.transpose(-1, -2).flip(-1, -2),
}


def images_in(values: Sequence[Any]) -> list[Samples]:
    """Return what may be images among the arguments of a module: (B, c, h, w), or B × (c, h, w)."""
    found = [leaf.value for value in values for leaf in leaves(value, (0,))]
    return [one for one in found if all(x.ndim == 3 and len(x) in _CHANNELS for x in _each(one))]


def difference(given: Sequence[Sequence[Samples]], image: Samples) -> str | None:
    """Describe how the view that a network was given differs from the batch's image.

    Args:
        given: What the network was given: groups of which one is enough, each made from the next
            by another module.
        image: (B, c, H, W), or B × (c, H, W).

    Returns:
        None where it is the same view, in whatever colors and size, or where there is no telling:
        the network was given no image, another number of samples, or images of one color.
    """
    for group in given:
        found = [_difference(one, image) for one in group]
        if None in found:
            return None
        # What is unlike the image may be features, which a module before made from the image.
        clear = [one for one in found if one != _UNLIKE]
        if clear:
            return clear[0]
    return _UNLIKE if given else None


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
        return "padded or cropped"
    explained = _explained(grid, of_image)
    if explained is None:
        return None
    turned = {name: _explained(grid, turn(of_image)) or 0.0 for name, turn in _TURNED.items()}
    best = max(turned, key=turned.__getitem__)
    if turned[best] >= _EXPLAINED and 1 - explained > max(_SYMMETRIC, 2 * (1 - turned[best])):
        return best
    return None if explained >= _EXPLAINED else _UNLIKE


def _is_padded_or_cropped(given: Tensor, image: Tensor) -> bool:
    """Whether pixels of the image lie unchanged at a corner or in the middle of what was given."""
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
    """Yield where a side of what was given and one of the image overlap: start, middle and end."""
    length, spare = min(given, image), abs(given - image)
    for offset in sorted({0, spare // 2, spare}):
        shifted, whole = slice(offset, offset + length), slice(0, length)
        yield (shifted, whole) if given > image else (whole, shifted)


def _explained(given: Tensor, image: Tensor) -> float | None:
    """Return the share of the variance of a channel that the image's colors explain.

    Args:
        given: (c, h, w) float32; the best of its channels counts.
        image: (k, h, w) float32.

    Returns:
        1 where a channel is a linear map of the image's; None where every channel is constant.
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


def _each(samples: Samples) -> Sequence[Tensor]:
    """Return samples; of a batched tensor one is enough."""
    return samples[:1] if isinstance(samples, Tensor) else samples
