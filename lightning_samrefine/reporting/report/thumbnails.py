"""Small WebP pictures of images, label maps and regions, as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_samrefine.refine.results import Regions
from lightning_samrefine.reporting.panels import change_kinds, change_table
from lightning_samrefine.utils.palette import colorize

TILE_WIDTH, _TILE_HEIGHT = 240, 960
_CROP_SIDE = 132
_PHOTO_QUALITY = 50
# A region's crop: what its mask and the truth share, what only the mask has, what it misses.
REGION_COLORS = {"right": (25, 195, 125), "too much": (255, 64, 64), "missed": (70, 120, 255)}
_TINT = 0.55


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Return (h, w) of an image's tiles: within 960 × 240 px, and no larger than the image."""
    scale = min(1.0, TILE_WIDTH / width, _TILE_HEIGHT / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def image_tiles(
    image: Tensor, raw: Tensor, refined: Tensor, target: Tensor, valid: Tensor, num_classes: int
) -> dict[str, str]:
    """Make the tiles of one image.

    Args:
        image: (3, H, W) uint8 RGB.
        raw: (H, W) integer.
        refined: (H, W) integer.
        target: (H, W) integer.
        valid: (H, W) bool, the pixels that are scored.
        num_classes: C.

    Returns:
        ``image``, ``raw``, ``refined``, ``truth``, and ``changed``, transparent where nothing
        changed: data URIs.
    """
    size = tile_size(*target.shape)
    photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    photo = photo.resize((size[1], size[0]), Image.Resampling.BOX)
    # A changed line of one pixel must not fall between the tile's pixels, hence the maximum; a
    # broken pixel hides a fixed one rather than the reverse.
    kinds = change_kinds(raw, refined, target, valid)
    order = torch.tensor([0, 2, 3, 1], dtype=torch.float32, device=kinds.device)
    pooled = F.adaptive_max_pool2d(order[kinds.long()][None, None], size)[0, 0].long().cpu()
    kind = torch.tensor([0, 3, 1, 2])[pooled].numpy()
    alpha = np.where(kind > 0, 255, 0).astype(np.uint8)
    changed = np.dstack([change_table()[kind], alpha])
    known = _shrunk(valid, size)
    flat = {
        "raw": colorize(_shrunk(raw, size), num_classes),
        "refined": colorize(_shrunk(refined, size), num_classes),
        "truth": colorize(_shrunk(target, size), num_classes, known),
    }
    return {
        "image": data_uri(photo),
        **{name: data_uri(Image.fromarray(tile), flat=True) for name, tile in flat.items()},
        "changed": data_uri(Image.fromarray(changed), flat=True),
    }


def region_crop(image: Tensor, target: Tensor, valid: Tensor, regions: Regions, index: int) -> str:
    """Draw a region and its surroundings, tinted by the agreement of SAM's mask with the truth.

    Returns a data URI.

    Args:
        image: (3, H, W) uint8 RGB.
        target: (H, W) integer.
        valid: (H, W) bool.
        regions: With masks.
        index: The region.
    """
    for own in regions.windows:
        if index < len(own.table):
            image, target, valid = (own.window.of(maps) for maps in (image, target, valid))
            return region_crop(image, target, valid, own.regions, index)
        index -= len(own.table)
    assert regions.masks is not None
    mask, c = regions.masks[index], int(regions.classes[index])
    height, width = target.shape
    x0, y0, x1, y1 = regions.extents[index].tolist()
    margin = 0.25 * max(x1 - x0, y1 - y0) + 4
    left, top = max(0, int(x0 - margin)), max(0, int(y0 - margin))
    right, bottom = min(width, int(x1 + margin) + 1), min(height, int(y1 + margin) + 1)
    window = (slice(top, bottom), slice(left, right))
    rows = torch.arange(top, bottom, device=mask.device) * mask.shape[0] // height
    columns = torch.arange(left, right, device=mask.device) * mask.shape[1] // width
    found = mask[rows][:, columns].cpu().numpy()
    truth = (target[window] == c).cpu().numpy()
    known = valid[window].cpu().numpy()
    picture = image[:, top:bottom, left:right].permute(1, 2, 0).cpu().numpy().astype(np.float32)
    for color, where in zip(
        REGION_COLORS.values(), (found & truth, found & ~truth, ~found & truth), strict=True
    ):
        part = where & known
        picture[part] = (1 - _TINT) * picture[part] + _TINT * np.array(color, np.float32)
    crop = Image.fromarray(picture.astype(np.uint8))
    crop.thumbnail((_CROP_SIDE, _CROP_SIDE))
    return data_uri(crop)


def data_uri(picture: Image.Image, flat: bool = False) -> str:
    """Encode as WebP: a photograph lossily, a ``flat`` picture of few colors without loss."""
    buffer = io.BytesIO()
    if flat:
        picture.save(buffer, "WEBP", lossless=True, quality=40, method=2)
    else:
        picture.save(buffer, "WEBP", quality=_PHOTO_QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shrunk(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the nearest pixel's value for each of the tile's, on the CPU."""
    rows = (torch.arange(size[0]) + 0.5) * (labels.shape[0] / size[0])
    columns = (torch.arange(size[1]) + 0.5) * (labels.shape[1] / size[1])
    return labels[rows.long().to(labels.device)][:, columns.long().to(labels.device)].cpu()
