"""Shapes: a synthetic data set of ten classes that trains in a minute without a download."""

import math

import torch
from torch import Tensor


def _regular_polygon(u: Tensor, v: Tensor, corners: int, inner: float) -> Tensor:
    """The depth inside a star of circumradius 1 whose notches lie at radius `inner`."""
    sector = math.pi / corners
    angle = torch.atan2(v, u).remainder(2 * sector)
    angle = torch.minimum(angle, 2 * sector - angle)  # the angle to the nearest corner
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin()
    edge_x, edge_y = inner * math.cos(sector) - 1, inner * math.sin(sector)  # corner to notch
    return (edge_x * y - edge_y * (x - 1)) / math.hypot(edge_x, edge_y)


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.minimum(half_width - u.abs(), half_height - v.abs())


# Each shape is a function of a point (u, v), relative to its center in units of its radius: how
# deep inside the shape the point is, negative outside.
SHAPES = {
    "disc": lambda u, v: 0.9 - torch.hypot(u, v),
    "ring": lambda u, v: 0.2 - (torch.hypot(u, v) - 0.75).abs(),
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "triangle": lambda u, v: _regular_polygon(u, v, corners=3, inner=0.5),
    "star": lambda u, v: _regular_polygon(u, v, corners=5, inner=0.4),
    "cross": lambda u, v: torch.maximum(_box(u, v, 1, 0.25), _box(u, v, 0.25, 1)),
    "bar": lambda u, v: _box(u, v, 1, 0.25),
    "half-disc": lambda u, v: torch.minimum(0.9 - torch.hypot(u, v + 0.4), v + 0.4),
    "crescent": lambda u, v: torch.minimum(
        0.95 - torch.hypot(u, v), torch.hypot(u - 0.5, v) - 0.75
    ),
    "hourglass": lambda u, v: torch.minimum(0.9 - v.abs(), 0.7 * (v.abs() - u.abs()) + 0.1),
}


def draw_shapes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one shape per image, at a random place, size, angle and color, on a texture.

    Args:
        count: images to draw, in random order, equally many of each of the ten `SHAPES`.
        seed: the same seed gives the same images.
        size: their height and width in pixels.

    Returns:
        Images (count, 3, size, size) uint8, labels (count,), and the masks of the shapes
        (count, size, size) bool.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(SHAPES)
    background = _textures(count, size, generator)
    # Bright shapes on dark textures: any hue may meet any other, and the shape always shows.
    color = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
    coverage = _shape_coverage(labels, size, generator)[:, None]  # (n, 1, size, size)
    images = torch.lerp(background, color.expand_as(background), coverage)
    images += 0.03 * torch.randn(images.shape, generator=generator)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels, labels, coverage[:, 0] > 0.5


def _shape_coverage(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """How much of every pixel the shapes cover, 0 to 1, with smooth edges: (n, size, size)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), 1, 1, generator=generator)

    radius = size * uniform(0.25, 0.42)
    room = 0.5 * size - 0.9 * radius  # only a corner may leave the image
    center_x, center_y = (size / 2 + room * uniform(-1, 1) for _ in range(2))
    angle = uniform(0, 2 * math.pi)
    pixel = torch.arange(size) + 0.5
    x = (pixel.view(1, 1, -1) - center_x) / radius
    y = (pixel.view(1, -1, 1) - center_y) / radius
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    coverage = torch.empty(len(labels), size, size)
    for label, depth in enumerate(SHAPES.values()):
        rows = labels == label
        coverage[rows] = (depth(u[rows], v[rows]) * radius[rows] + 0.5).clamp(0, 1)
    return coverage


def _textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Two colors in waves of random direction and length: (count, 3, size, size) in 0-1."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    base, other = 0.4 * uniform(3, 1, 1), 0.4 * (uniform(3, 1, 1) - 0.5)
    pixel = torch.arange(size) / size
    turns = 1 + 5 * uniform(1, 1, 1)  # waves across the image
    angle, phase = 2 * math.pi * uniform(1, 1, 1), 2 * math.pi * uniform(1, 1, 1)
    along = pixel.view(1, 1, 1, -1) * angle.cos() + pixel.view(1, 1, -1, 1) * angle.sin()
    wave = torch.sin(2 * math.pi * turns * along + phase)  # (n, 1, size, size)
    return (base + other * wave).clamp(0, 1)
