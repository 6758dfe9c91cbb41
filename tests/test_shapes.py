"""The Shapes: balanced, repeatable, with the areas of geometry, where their masks are."""

import numpy as np
import pytest
import torch

from shapes import SHAPES, draw_shapes


def test_shapes_are_the_same_for_the_same_seed_and_balanced():
    first, again, other = draw_shapes(200, seed=1), draw_shapes(200, seed=1), draw_shapes(200, 2)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    images, labels, masks = first
    assert labels.bincount().tolist() == [20] * 10
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert masks.shape == (200, 32, 32) and masks.dtype == torch.bool


def test_the_mask_is_where_the_shape_is():
    images, _, inside = draw_shapes(500, seed=0)
    brightest = images.amax(dim=1).float()  # shapes are bright, textures dark
    share = inside.float().mean(dim=(1, 2))
    assert 0.01 < share.min() and share.max() < 0.6
    assert (brightest[inside] > 110).float().mean() > 0.97
    contrast = [
        image[mask].mean() - image[~mask].mean()
        for image, mask in zip(brightest, inside, strict=True)
    ]
    assert min(contrast) > 25


def test_shapes_have_the_areas_of_their_definitions():
    """Upright and alone, each shape covers the area that geometry gives, in units of radius^2."""
    side = torch.linspace(-1.2, 1.2, 601)
    v, u = torch.meshgrid(side, side, indexing="ij")
    pixel = (side[1] - side[0]).item() ** 2
    known = {
        "disc": torch.pi * 0.9**2,
        "ring": torch.pi * (0.95**2 - 0.55**2),
        "square": 1.5**2,
        "triangle": 3 * 3**0.5 / 4,
        "star": 5 * 0.4 * np.sin(np.pi / 5),
        "cross": 2 * 2 * 0.5 - 0.5**2,
        "bar": 2 * 0.5,
    }
    for name, area in known.items():
        covered = (SHAPES[name](u, v) > 0).sum().item() * pixel
        assert covered == pytest.approx(area, rel=0.02), name
