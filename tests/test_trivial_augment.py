"""TrivialAugment against torchvision's, operation by operation and image by image."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2

import trivial_augment
from small import generator
from trivial_augment import BINS, OPS, apply

TORCHVISIONS = v2.TrivialAugmentWide()
SPACE = torch.from_numpy(trivial_augment.MAGNITUDES)  # (sign, operation, bin)
DEGREES = (45.0, 135.0)  # pixels on both diagonals come from halfway between two pixels
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")


def pictures(channels, height, width):
    """Noise, noise of low contrast, a ramp, one color, and two colors: (5, C, H, W)."""
    shape = (channels, height, width)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator(0))
    ramp = (7 * torch.arange(height)[:, None] + 3 * torch.arange(width)).expand(shape) % 256
    flat = torch.full(shape, 77, dtype=torch.uint8)
    two = flat.clone()
    two[:, : height // 3] = 200
    return torch.stack([noise, noise // 8 + 60, ramp.to(torch.uint8), flat, two])


def reference(images, op, magnitude):
    """The images after one operation of torchvision's policy."""
    return TORCHVISIONS._apply_image_or_video_transform(
        images, OPS[op], float(magnitude), TORCHVISIONS.interpolation, TORCHVISIONS._fill
    )


# ---------------------------------------------------------------------------- operations


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 24, 36), (1, 16, 16), (3, 2, 4)])
@pytest.mark.parametrize("op", range(len(OPS)), ids=OPS)
def test_an_operation_is_torchvisions_at_every_magnitude(op, size):
    """Exactly, except where the last bit of a float decides.

    That is on the diagonals at 45 and 135 degrees, and where a blend gives a whole number, as
    torch rounds down: no value here, but other CPUs may add and multiply in two steps.
    """
    images = pictures(*size)
    magnitudes = SPACE[:, op].flatten().unique()
    after = apply(
        images.repeat(len(magnitudes), 1, 1, 1),
        np.full(len(magnitudes) * len(images), op),
        magnitudes.repeat_interleave(len(images)).numpy(),
    )
    for magnitude, ours in zip(magnitudes, after.split(len(images)), strict=True):
        theirs = reference(images, op, magnitude)
        if OPS[op] == "Rotate" and abs(magnitude) in DEGREES:
            assert (ours != theirs).any(dim=1).sum(dim=(1, 2)).max() <= 2 * min(size[1:])
        elif OPS[op] in BLENDS:
            assert (ours != theirs).float().mean() < 1e-3
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1)
        else:
            assert torch.equal(ours, theirs)


def test_each_image_has_its_own_operation_and_magnitude():
    images = pictures(3, 20, 32).repeat(40, 1, 1, 1)
    op = torch.randint(len(OPS), (200,), generator=generator(1))
    magnitude = SPACE[torch.arange(200) % 2, op, 9]
    before = images.clone()
    changed = apply(images, op.numpy(), magnitude.numpy())
    expected = [reference(*each) for each in zip(images, op, magnitude, strict=True)]
    assert torch.equal(changed, torch.stack(expected))
    assert torch.equal(images, before)


# ---------------------------------------------------------------------------- draws


def test_the_magnitudes_are_torchvisions():
    theirs = TORCHVISIONS._AUGMENTATION_SPACE
    assert OPS == tuple(theirs)
    for name, ours in zip(OPS, SPACE.unbind(1), strict=True):
        magnitudes, signed = theirs[name]
        magnitudes = magnitudes(BINS, 32, 32)
        magnitudes = torch.zeros(BINS) if magnitudes is None else magnitudes.float()
        assert torch.equal(ours, torch.stack([magnitudes, -magnitudes if signed else magnitudes]))


def test_operations_magnitudes_and_signs_are_drawn_alike(monkeypatch):
    """A chi-square of each is within five standard deviations of its expectation."""
    images = torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8)
    draws = []
    monkeypatch.setattr(
        trivial_augment, "apply", lambda images, *drawn: draws.append(drawn) or images
    )
    trivial_augment.trivial_augment(images, np.random.default_rng(0))
    op, magnitude = map(torch.from_numpy, draws[0])

    def alike(counts):
        expected = counts.sum() / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = len(counts) - 1
        return abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5

    assert alike(op.bincount(minlength=len(OPS)))
    for name in ("ShearX", "Rotate", "Sharpness"):
        drawn = magnitude[op == OPS.index(name)]
        places = torch.bucketize(drawn.abs(), SPACE[0, OPS.index(name)])
        assert alike(places.bincount(minlength=BINS))
        assert alike(torch.stack([(drawn > 0).sum(), (drawn < 0).sum()]))
    places = (1 - magnitude[op == OPS.index("Solarize")]) * (BINS - 1)
    assert alike(places.round().long().bincount(minlength=BINS))
