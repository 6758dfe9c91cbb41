"""The policies against torchvision's, operation by operation and image by image."""

import pytest
import torch
import torchvision.transforms.v2 as v2
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import policy
from policy import BINS, OPS, apply, rand_augment, rand_space, trivial_augment, trivial_space

POLICIES = {"trivial": v2.TrivialAugmentWide(), "rand": v2.RandAugment()}
DEGREES = (45.0, 135.0)  # the sources of the pixels on both diagonals lie between two pixels
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pictures(channels, height, width):
    """Noise, noise of low contrast, a ramp, one color, and two colors: (5, C, H, W)."""
    shape = (channels, height, width)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator(0))
    ramp = (7 * torch.arange(height)[:, None] + 3 * torch.arange(width)).expand(shape) % 256
    flat = torch.full(shape, 77, dtype=torch.uint8)
    two = flat.clone()
    two[:, : height // 3] = 200
    return torch.stack([noise, noise // 8 + 60, ramp.to(torch.uint8), flat, two])


def space_of(name, height, width):
    cpu = torch.device("cpu")
    return trivial_space(cpu) if name == "trivial" else rand_space(cpu, height, width)


def reference(images, kind, op, magnitude):
    """What torchvision's policy does to images by one operation."""
    transform = POLICIES[kind]
    return transform._apply_image_or_video_transform(
        images, OPS[op], float(magnitude), transform.interpolation, transform._fill
    )


# ---------------------------------------------------------------------------- operations


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 24, 36), (1, 16, 16), (3, 2, 4)])
@pytest.mark.parametrize("op", range(len(OPS)), ids=OPS)
def test_an_operation_is_torchvisions_at_every_magnitude(op, size):
    """Exactly, but for what the last bit of a float decides.

    Those are the diagonals at 45 and 135 degrees, and values that a blend puts at a whole number,
    since torch rounds down: no value here, but other CPUs may add and multiply in two steps.
    """
    images = pictures(*size)
    magnitudes = trivial_space(torch.device("cpu"))[:, op].flatten().unique()
    after = apply(
        images.repeat(len(magnitudes), 1, 1, 1),
        torch.full((len(magnitudes) * len(images),), op),
        magnitudes.repeat_interleave(len(images)),
    )
    for magnitude, ours in zip(magnitudes, after.split(len(images)), strict=True):
        theirs = reference(images, "trivial", op, magnitude)
        if OPS[op] == "Rotate" and abs(magnitude) in DEGREES:
            assert (ours != theirs).any(dim=1).sum(dim=(1, 2)).max() <= 2 * min(size[1:])
        elif OPS[op] in BLENDS:
            assert (ours != theirs).float().mean() < 1e-3
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_each_image_has_its_own_operation_and_magnitude(kind):
    images = pictures(3, 20, 32).repeat(40, 1, 1, 1)
    space = space_of(kind, 20, 32)
    op = torch.randint(len(OPS), (200,), generator=generator(1))
    magnitude = space[torch.arange(200) % 2, op, 9]
    before = images.clone()
    changed = apply(images, op, magnitude)
    expected = [reference(*each) for each in zip(images, [kind] * 200, op, magnitude, strict=True)]
    assert torch.equal(changed, torch.stack(expected))
    assert torch.equal(images, before)


def test_a_gpus_way_gives_the_same_as_a_cpus():
    """The way without row indices, taken by any device that is not a CPU."""
    images = pictures(3, 20, 32).repeat(40, 1, 1, 1)
    op = torch.arange(200) % len(OPS)
    magnitude = trivial_space(torch.device("cpu"))[torch.arange(200) % 2, op, 20]
    expected = apply(images, op, magnitude)
    assert torch.equal(policy.apply_to_all(images, op, magnitude), expected)


def test_batches_of_one_image_and_of_none():
    image = pictures(3, 8, 8)[:1]
    magnitudes = trivial_space(torch.device("cpu"))[0, :, 19]
    for op, magnitude in enumerate(magnitudes):
        changed = apply(image, torch.tensor([op]), magnitude[None])
        assert torch.equal(changed, reference(image, "trivial", op, magnitude))
    assert apply(image[:0], torch.arange(0), torch.zeros(0)).shape == (0, 3, 8, 8)


# ---------------------------------------------------------------------------- draws


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_the_magnitudes_are_torchvisions(kind, size):
    theirs = POLICIES[kind]._AUGMENTATION_SPACE
    assert OPS == tuple(theirs)
    for name, ours in zip(OPS, space_of(kind, *size).unbind(1), strict=True):
        magnitudes, signed = theirs[name]
        magnitudes = magnitudes(BINS, *size)
        magnitudes = torch.zeros(BINS) if magnitudes is None else magnitudes.float()
        assert torch.equal(ours, torch.stack([magnitudes, -magnitudes if signed else magnitudes]))


def recorded(monkeypatch, draw):
    """The operations and magnitudes that a policy draws."""
    draws = []
    monkeypatch.setattr(policy, "apply", lambda images, *drawn: draws.append(drawn) or images)
    draw()
    return draws


def test_operations_magnitudes_and_signs_are_drawn_alike(monkeypatch):
    """By a chi-square of each, within five standard deviations of what is expected."""
    space, B = trivial_space(torch.device("cpu")), 50_000
    images = torch.zeros(B, 1, 1, 1, dtype=torch.uint8)
    ((op, magnitude),) = recorded(monkeypatch, lambda: trivial_augment(images, generator(0)))

    def alike(counts):
        expected = counts.sum() / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = len(counts) - 1
        return abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5

    assert alike(op.bincount(minlength=len(OPS)))
    for name in ("ShearX", "Rotate", "Sharpness"):
        drawn = magnitude[op == OPS.index(name)]
        places = torch.bucketize(drawn.abs(), space[0, OPS.index(name)])
        assert alike(places.bincount(minlength=BINS))
        assert alike(torch.stack([(drawn > 0).sum(), (drawn < 0).sum()]))
    places = (1 - magnitude[op == OPS.index("Solarize")]) * (BINS - 1)
    assert alike(places.round().long().bincount(minlength=BINS))


def test_rand_augment_draws_twice_at_one_magnitude(monkeypatch):
    images = torch.zeros(2000, 3, 16, 48, dtype=torch.uint8)
    draws = recorded(monkeypatch, lambda: rand_augment(images, 9, generator(0)))
    assert len(draws) == 2
    assert not torch.equal(draws[0][0], draws[1][0])
    space = rand_space(torch.device("cpu"), 16, 48)
    for op, magnitude in draws:
        assert torch.equal(magnitude.abs(), space[0, op, 9])
        assert len(op.unique()) == len(OPS)


def test_a_policy_follows_its_generator():
    images = pictures(3, 16, 16).repeat(20, 1, 1, 1)
    for draw in (trivial_augment, lambda images, source: rand_augment(images, 9, source)):
        first, again, other = (draw(images, generator(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len(first[::5].unique(dim=0)) > 10  # 20 copies of an image have draws of their own


# ---------------------------------------------------------------------------- devices


class OnGPU(TorchDispatchMode):
    """Refuses operations on tensors elsewhere: to copy one to a GPU makes the host wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for each in tree_leaves((args, kwargs)):
            assert not isinstance(each, torch.Tensor) or each.is_cuda, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_waits_for_a_gpu(channels):
    """A fake tensor has no values: to need one, on the host or for a shape, is an error."""
    try:
        with FakeTensorMode(), OnGPU():
            images = torch.empty(6, channels, 16, 24, dtype=torch.uint8, device="cuda")
            for changed in (trivial_augment(images, None), rand_augment(images, 9, None)):
                assert changed.shape == images.shape
                assert changed.dtype == torch.uint8
                assert changed.device.type == "cuda"
            with pytest.raises(DynamicOutputShapeException):
                images.nonzero()
            with pytest.raises(AssertionError):
                torch.zeros(6).to(images.device)
    finally:  # of fake magnitudes
        trivial_space.cache_clear()
        rand_space.cache_clear()
