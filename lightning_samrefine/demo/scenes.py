"""Scenes: a procedural segmentation dataset, deterministic by (seed, index).

A scene shows textured objects of five shape classes over a textured, shaded background, with
occlusion, thin parts, soft borders, shadows, blur and noise. Label and instance maps are exact.
Objects differ from their background in color, so that a careful human could trace them, but
color only hints at the class: shape determines it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

CLASS_NAMES: tuple[str, ...] = ("background", "blob", "box", "star", "ring", "tree")

MIN_SIZE = 64
MIN_OBJECTS, MAX_OBJECTS = 3, 8

_SUPERSAMPLE = 4
_MIN_VISIBLE = 0.45
_CLASS_HUE_PROBABILITY = 0.5
_MIN_COLOR_DISTANCE = 75.0

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]
# A shape is drawn as a sequence of filled polygons in units of its radius; False cuts a hole.
Shape = list[tuple[Points, bool]]


@dataclass(frozen=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: (3, H, W) uint8, RGB, 0 to 255.
        labels: (H, W) int64, the class of each pixel, an index into `CLASS_NAMES`.
        instances: (H, W) int64, 0 for background, otherwise the object's index, starting at 1.
    """

    image: Tensor
    labels: Tensor
    instances: Tensor


def _ellipse(cx: float, cy: float, rx: float, ry: float, count: int = 40) -> Points:
    angle = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _limb(start: tuple[float, float], end: tuple[float, float], w0: float, w1: float) -> Points:
    """Quadrilateral from `start` to `end`, `w0` wide at its start and `w1` at its end."""
    a, b = np.asarray(start), np.asarray(end)
    along = b - a
    normal = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) / 2.0
    return np.stack([a + normal * w0, b + normal * w1, b - normal * w1, a - normal * w0])


def _blob(rng: np.random.Generator) -> Shape:
    angle = np.linspace(0.0, 2.0 * np.pi, 72, endpoint=False)
    radius = np.ones_like(angle)
    for harmonic in (2, 3, 4):
        phase = rng.uniform(0.0, 2.0 * np.pi)
        radius += rng.uniform(0.0, 0.28) / harmonic * np.cos(harmonic * angle + phase)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return [(0.9 * outline, True)]


def _box(rng: np.random.Generator) -> Shape:
    half_height = rng.uniform(0.4, 0.85)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * np.array([0.9, half_height])
    return [(corners, True)]


def _star(rng: np.random.Generator) -> Shape:
    tips = int(rng.integers(4, 8))
    angle = np.linspace(0.0, 2.0 * np.pi, 2 * tips, endpoint=False)
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.15, rng.uniform(0.38, 0.58))
    radius = radius * rng.uniform(0.9, 1.1, 2 * tips)
    return [(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), True)]


def _ring(rng: np.random.Generator) -> Shape:
    flattening = rng.uniform(0.7, 1.0)
    hole = rng.uniform(0.45, 0.72)
    return [
        (_ellipse(0.0, 0.0, 1.0, flattening), True),
        (_ellipse(0.0, 0.0, hole, hole * flattening), False),
    ]


def _tree(rng: np.random.Generator) -> Shape:
    lean, width = rng.uniform(-0.15, 0.15), rng.uniform(0.11, 0.17)
    shape: Shape = [(_limb((0.0, 1.35), (lean, -0.5), width, 0.8 * width), True)]
    for side in (-1.0, 1.0):
        root = rng.uniform(0.0, 0.6)
        tip = (side * rng.uniform(0.45, 0.75), root - rng.uniform(0.3, 0.5))
        shape.append((_limb((lean * 0.5, root), tip, 0.8 * width, 0.6 * width), True))
    for _ in range(int(rng.integers(3, 6))):
        cx, cy = rng.uniform(-0.4, 0.4) + lean, rng.uniform(-0.95, -0.5)
        shape.append((_ellipse(cx, cy, rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.45)), True))
    return shape


_SHAPES: tuple[Callable[[np.random.Generator], Shape], ...] = (_blob, _box, _star, _ring, _tree)


def _rasterize(
    shape: Shape, radius: float, turn: float, cx: float, cy: float
) -> tuple[Floats, int, int]:
    """Coverage (h, w) in [0, 1] of a placed shape, and its crop's left and top in the image."""
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    placed = [(points @ rotation * radius + (cx, cy), fill) for points, fill in shape]
    corners = np.concatenate([points for points, _ in placed])
    left, top = np.floor(corners.min(axis=0)).astype(int) - 3
    width, height = np.ceil(corners.max(axis=0)).astype(int) + 3 - (left, top)
    canvas = Image.new("L", (int(width) * _SUPERSAMPLE, int(height) * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for points, fill in placed:
        draw.polygon(
            [(x, y) for x, y in ((points - (left, top)) * _SUPERSAMPLE).tolist()],
            fill=255 if fill else 0,
        )
    coverage = np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)
    return coverage, int(left), int(top)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """(height, width) float32 in [0, 1]: noise on a `cells`-wide lattice, bicubically upsampled."""
    rows = max(2, round(cells * height / width))
    lattice = Image.fromarray(rng.random((rows, max(2, cells)), dtype=np.float32))
    field = np.asarray(lattice.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(field, 0.0, 1.0)


def _texture(
    rng: np.random.Generator, height: int, width: int, first: Floats, second: Floats
) -> Floats:
    """(height, width, 3) float32 pattern that varies between two colors."""
    kind = int(rng.integers(5))
    mix: npt.NDArray[np.floating[Any]]
    if kind in (0, 1):
        turn, period = rng.uniform(0.0, np.pi), rng.uniform(6.0, 20.0)
        y = np.arange(height, dtype=np.float32)[:, None]
        x = np.arange(width, dtype=np.float32)[None, :]
        # Python floats: NumPy's own float64 scalars would widen the whole map.
        u, v = (float(w * 2.0 * np.pi / period) for w in (np.cos(turn), np.sin(turn)))
        wave = np.sin(x * u + y * v)
        if kind == 1:
            wave = wave * np.sin(y * u - x * v)
        mix = np.clip(0.5 + 1.5 * wave, 0.0, 1.0)
    elif kind == 2:
        mix = np.clip(_smooth_noise(rng, height, width, max(3, width // 6)) * 3.0 - 1.0, 0.0, 1.0)
    elif kind == 3:
        mix = _smooth_noise(rng, height, width, 3)
    else:
        coarse = _smooth_noise(rng, height, width, max(3, width // 20))
        mix = 0.6 * coarse + 0.4 * _smooth_noise(rng, height, width, max(3, width // 4))
    pattern = mix.astype(np.float32)[..., None] * (second - first)
    pattern += first
    return pattern


def _color(rng: np.random.Generator, avoid: list[Floats], hue: float | None = None) -> Floats:
    """RGB (3,) float32 in [0, 255], at a clear distance from every color in `avoid`."""
    best, best_distance = np.zeros(3, np.float32), -1.0
    for attempt in range(24):
        # A class's hue is preferred; if the surroundings already have it, another one is drawn.
        preferred = hue is not None and attempt < 10
        h = (hue + rng.normal(0.0, 0.04)) % 1.0 if preferred and hue is not None else rng.random()
        rgb = colorsys.hsv_to_rgb(h, rng.uniform(0.15, 0.9), rng.uniform(0.25, 0.95))
        color = np.array(rgb, np.float32) * 255
        distance = min((float(np.linalg.norm(color - other)) for other in avoid), default=1e9)
        if distance > best_distance:
            best, best_distance = color, distance
        if best_distance >= _MIN_COLOR_DISTANCE:
            break
    return best


def _variant(rng: np.random.Generator, color: Floats, strength: float) -> Floats:
    """A second color for a texture, `strength` away from the first one in RGB."""
    direction = rng.standard_normal(3).astype(np.float32)
    return np.clip(color + strength * direction / np.linalg.norm(direction), 0.0, 255.0)


def _paste(
    rng: np.random.Generator,
    canvas: Floats,
    labels: npt.NDArray[np.int64],
    instances: npt.NDArray[np.int64],
    palette: list[Floats],
    areas: list[int],
) -> None:
    """Draw one more object in place, unless no position leaves the earlier ones visible."""
    size = canvas.shape[0]
    label = int(rng.integers(1, len(CLASS_NAMES)))
    shape = _SHAPES[label - 1](rng)
    is_tree = CLASS_NAMES[label] == "tree"
    turn = rng.normal(0.0, 0.15) if is_tree else rng.uniform(0.0, 2.0 * np.pi)
    for _ in range(8):
        radius = size * rng.uniform(0.095, 0.2)
        cx, cy = rng.uniform(0.06 * size, 0.94 * size, 2)
        coverage, left, top = _rasterize(shape, radius, turn, cx, cy)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + coverage.shape[1], size), min(top + coverage.shape[0], size)
        coverage = coverage[y0 - top : y1 - top, x0 - left : x1 - left]
        window = (slice(y0, y1), slice(x0, x1))
        solid = coverage >= 0.5
        area = int(solid.sum())
        if area < 0.004 * size * size:
            continue
        hidden = np.bincount(instances[window][solid], minlength=len(areas) + 1)[1:]
        visible = np.bincount(instances.ravel(), minlength=len(areas) + 1)[1:] - hidden
        if all(v >= _MIN_VISIBLE * a for v, a in zip(visible, areas, strict=True)):
            break
    else:
        return
    # A different color is needed only for the background and the neighbors.
    touched = np.flatnonzero(np.bincount(instances[window].ravel()))
    avoid = palette[:3] + [palette[2 + k] for k in touched if k > 0]
    hue = label / 5.5 if rng.random() < _CLASS_HUE_PROBABILITY else None
    color = _color(rng, avoid, hue)
    skin = _texture(rng, y1 - y0, x1 - x0, color, _variant(rng, color, rng.uniform(0.0, 45.0)))
    skin *= rng.uniform(0.85, 1.0) + 0.25 * _smooth_noise(rng, y1 - y0, x1 - x0, 2)[..., None]
    alpha = coverage
    if rng.random() < 0.5:
        softness = ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1))
        soft = Image.fromarray((coverage * 255).astype(np.uint8)).filter(softness)
        alpha = np.asarray(soft, dtype=np.float32) / np.float32(255)
    if rng.random() < 0.4:
        _cast_shadow(rng, canvas, coverage, x0, y0)
    canvas[window] += alpha[..., None] * (skin - canvas[window])
    labels[window][solid] = label
    instances[window][solid] = len(areas) + 1
    areas.append(area)
    palette.append(color)


def _cast_shadow(
    rng: np.random.Generator, canvas: Floats, coverage: Floats, x0: int, y0: int
) -> None:
    """Darken the canvas below and beside an object about to be drawn."""
    size = canvas.shape[0]
    dx, dy = (int(v) for v in rng.integers(2, 7, 2))
    blurred = Image.fromarray((coverage * 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(2.5)
    )
    shadow = np.asarray(blurred, dtype=np.float32) / np.float32(255)
    shadow = shadow[: max(size - y0 - dy, 0), : max(size - x0 - dx, 0)]
    h, w = shadow.shape
    canvas[y0 + dy : y0 + dy + h, x0 + dx : x0 + dx + w] *= 1.0 - 0.35 * shadow[..., None]


def make_scene(seed: int, index: int, size: int = 256) -> Scene:
    """Render scene `index` of the family `seed`.

    Args:
        seed: family of scenes, ≥ 0. Families are independent.
        index: index of the scene in its family, ≥ 0.
        size: height and width of the scene in pixels, ≥ 64.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed={seed} and index={index}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be >= {MIN_SIZE} pixels, got {size}")
    rng = np.random.default_rng((seed, index))
    first = _color(rng, [])
    second = _variant(rng, first, rng.uniform(10.0, 50.0))
    palette: list[Floats] = [first, second, ((first + second) / 2).astype(np.float32)]
    canvas = _texture(rng, size, size, first, second)
    labels = np.zeros((size, size), np.int64)
    instances = np.zeros((size, size), np.int64)
    areas: list[int] = []
    for _ in range(int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))):
        _paste(rng, canvas, labels, instances, palette, areas)
    canvas *= 0.8 + 0.35 * _smooth_noise(rng, size, size, 3)[..., None]
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))
        picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).filter(blur)
        canvas = np.asarray(picture, dtype=np.float32)
    grain = rng.standard_normal((size, size, 3), dtype=np.float32)
    grain *= rng.uniform(1.0, 9.0)
    grain += canvas + 0.5
    image = np.clip(grain, 0, 255, out=grain).astype(np.uint8)
    return Scene(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        labels=torch.from_numpy(labels),
        instances=torch.from_numpy(instances),
    )


class ScenesDataset(Dataset[dict[str, Tensor]]):
    """Map-style dataset of scenes, rendered on access.

    Items are dictionaries with `image`, (3, size, size) uint8 RGB in 0 to 255, and `mask`,
    (size, size) int64 class labels.

    Args:
        seed: family of scenes, ≥ 0. Use different seeds for disjoint splits.
        length: number of scenes, ≥ 1.
        size: height and width of each scene in pixels, ≥ 64.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, seed: int, length: int, size: int = 256) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if length < 1:
            raise ValueError(f"length must be >= 1, got {length}")
        if size < MIN_SIZE:
            raise ValueError(f"size must be >= {MIN_SIZE} pixels, got {size}")
        self.seed = seed
        self.length = length
        self.size = size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        scene = make_scene(self.seed, index, self.size)
        return {"image": scene.image, "mask": scene.labels}
