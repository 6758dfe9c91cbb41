"""Augmentation against torchvision's own operations, image by image."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as reference

from augment import Augmentation, cutmix, mixup, random_crop, random_resized_crop, resized_crop
from recipes import TrainConfig
from small import generator
from ViT import ViTConfig

# Image n of these has the value n.
NUMBERED = torch.arange(64, dtype=torch.uint8)[:, None, None, None].expand(64, 3, 8, 12)


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 8, 12), dtype=torch.uint8, generator=generator(0))


@pytest.fixture
def targets():
    return F.one_hot(torch.arange(64) % 10, 10).double()


# ---------------------------------------------------------------------------- place


def mirrored(images, flipped):
    """Which images are mirrored, (B,); each must be itself or its mirror image."""
    mirrors = reference.horizontal_flip(images)
    same, found = ((flipped == each).flatten(1).all(1) for each in (images, mirrors))
    assert (same ^ found).all()
    return found


def test_an_image_is_mirrored_about_half_of_the_time_or_in_every_other_epoch(images):
    flipped = [mirrored(images, augment(images, {"flip": "random"}, seed)[0]) for seed in (1, 2)]
    assert all(20 < each.sum() < 44 for each in flipped) and not torch.equal(*flipped)
    first, second, third = (
        mirrored(images, augment(images, {"flip": "alternating"}, epoch=epoch)[0])
        for epoch in range(3)
    )
    assert 20 < first.sum() < 44 and torch.equal(first, ~second) and torch.equal(first, third)


def test_each_image_is_some_crop_of_its_padded_self(images):
    cropped = random_crop(images, 2, generator(1))
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    padded, places = reference.pad(images, [2]), []
    for row in range(64):
        found = [
            (top, left)
            for top, left in itertools.product(range(5), repeat=2)
            if torch.equal(cropped[row], reference.crop(padded[row], top, left, 8, 12))
        ]
        assert len(found) == 1
        places += found
    assert {top for top, _ in places} == {left for _, left in places} == set(range(5))


def test_a_resized_window_is_that_of_torchvision(images):
    """Enlarged by a whole factor; torchvision resamples without antialiasing here."""
    boxes = [(0, 0, 4, 6), (2, 3, 4, 6), (4, 6, 4, 6), (0, 0, 8, 12)]  # top, left, height, width
    windows = torch.tensor(boxes).T / torch.tensor([[8], [12], [8], [12]])
    found = resized_crop(images[:4], windows)
    for image, box, ours in zip(images, boxes, found, strict=False):
        expected = reference.resized_crop(image.float(), *box, [8, 12], antialias=False)
        inner = (ours - expected).abs()[:, 1:-1, 1:-1]  # a border pixel sees what lies beyond it
        assert inner.max() <= 0.5 + 1e-3


def test_around_a_crop_the_border_repeats_as_grid_sample_has_it(images):
    """grid_sample with padding_mode="border", which MPS lacked before torch 2.13."""
    height, width, down, across = torch.rand(4, 64, generator=generator(1))
    top, left, none = down * (1 - height), across * (1 - width), torch.zeros(64)
    rows = [[width, none, 2 * left + width - 1], [none, height, 2 * top + height - 1]]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (64, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    assert (grid[..., 0].abs() > 1 - 1 / 12).any() and (grid[..., 1].abs() > 1 - 1 / 8).any()
    expected = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    windows = torch.stack([top, left, height, width])
    assert torch.equal(resized_crop(images, windows), expected.round().to(torch.uint8))


def test_a_random_resized_crop_keeps_area_and_aspect_and_stays_inside():
    ramp = torch.arange(0, 250, 10).repeat(25, 1).to(torch.uint8)  # (25, 25), rising by column
    images = torch.stack([ramp, ramp.T]).expand(2000, 1, 2, 25, 25).reshape(4000, 1, 25, 25)
    images = torch.cat([images[::2], images[1::2]], dim=1)  # the column and the row of a pixel
    crops = random_resized_crop(images, 0.25, generator(0)).float()
    width = (crops[:, 0].amax((1, 2)) - crops[:, 0].amin((1, 2))) / 240
    height = (crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))) / 240
    area, aspect = width * height, width / height
    assert area.min() > 0.2 and area.max() == 1 and area.mean() == pytest.approx(0.6, abs=0.05)
    assert aspect.min() > 0.7 and aspect.max() < 1.45
    assert crops.min() == 0 and crops.max() == 240


# ---------------------------------------------------------------------------- mixing


def test_mixup_is_torchvisions_with_a_share_for_each_image(images, targets):
    shares = torch.linspace(0, 1, 64, dtype=torch.float64)
    mixed, labels = mixup(images, targets, shares)
    for row in range(64):
        pair, their_targets = images[[row - 1, row]], targets[[row - 1, row]]
        transform = v2.MixUp(num_classes=10)
        parameters = {"lam": shares[row].item(), "labels": their_targets, "batch_size": 2}
        expected = transform.transform(pair.double(), parameters)[1]
        torch.testing.assert_close(mixed[row].double(), expected, atol=1, rtol=0)  # rounded down
        torch.testing.assert_close(labels[row], transform.transform(their_targets, parameters)[1])


def test_cutmix_is_torchvisions_with_a_box_for_each_image():
    shares = torch.linspace(0, 1, 64, dtype=torch.float64)
    mixed, boxes = cutmix(NUMBERED, shares, generator(2))
    corners = set()
    for row in range(64):
        changed = mixed[row, 0] != row
        assert (mixed[row] == torch.where(changed, (row - 1) % 64, row)).all()
        assert torch.equal(boxes[row, 0], changed)
        if not changed.any():
            continue
        # The box is the one that torchvision makes for this share and this center.
        y, x = changed.nonzero(as_tuple=True)
        top, left, bottom, right = int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1
        assert changed[top:bottom, left:right].all()
        half = 0.5 * (1 - shares[row].item()) ** 0.5
        assert bottom - top <= 2 * int(half * 8) and right - left <= 2 * int(half * 12)
        if 0 < top and bottom < 8:
            assert bottom - top == 2 * int(half * 8)
        if 0 < left and right < 12:
            assert right - left == 2 * int(half * 12)
        corners.add((top, left))
    assert len(corners) > 10


# ---------------------------------------------------------------------------- a recipe's


EVERYTHING = {
    "flip": "random",
    "crop_padding": 2,
    "resized_crop": 0.5,
    "policy": "trivial",
    "mixup": 0.8,
    "cutmix": 1.0,
}
NOTHING = {"flip": "off", "crop_padding": 0}
ROWS = torch.arange(64)


def augmentation(**options):
    model = ViTConfig(image_size=(8, 12), patch_size=2)
    return Augmentation(TrainConfig(**NOTHING | options), model, 64, torch.device("cpu"))


def augment(images, options, seed=1, epoch=0):
    """Images and targets as a recipe augments them, with labels 0 to 9 in turn."""
    seen, targets, kept = augmentation(**options)(images, ROWS % 10, ROWS, epoch, seed)
    assert kept is None
    return seen, targets


OPTIONS = [{name: EVERYTHING[name]} for name in EVERYTHING]


@pytest.mark.parametrize("options", [{}, {"flip": "alternating"}, *OPTIONS], ids=str)
def test_each_option_of_a_recipe_changes_the_images_and_nothing_else_does(images, targets, options):
    seen, labels = augment(images, options)
    assert torch.equal(seen, images) == (not options) and seen.dtype == torch.uint8
    assert torch.equal(labels, targets.float()) == (not {"mixup", "cutmix"} & options.keys())
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(64))


def test_the_same_seed_gives_the_same_images_and_another_seed_others(images):
    first, second, other = (augment(images, EVERYTHING, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_an_image_is_flipped_in_the_same_epochs_in_whichever_batch_it_comes(images):
    alternating, some = augmentation(flip="alternating"), torch.tensor([50, 3, 21])
    whole = alternating(images, ROWS % 10, ROWS, 3, 1).images
    assert torch.equal(alternating(images[some], some % 10, some, 3, 2).images, whole[some])


@pytest.mark.parametrize(
    "options",
    [{"cutmix": 1.0, "mixing_off_epochs": 2}, {"policy": "trivial", "policy_off_epochs": 2}],
)
def test_strong_augmentation_ends_so_many_epochs_before_the_end(images, options):
    options = options | {"epochs": 10, "warmup_epochs": 0}
    seen = [augment(images, options, epoch=epoch)[0] for epoch in range(10)]
    changed = [not torch.equal(each, images) for each in seen]
    assert changed == [True] * 8 + [False] * 2


def test_with_both_kinds_of_mixing_each_image_has_one_of_them():
    seen, _ = augment(NUMBERED * 4, {"mixup": 1.0, "cutmix": 1.0})
    plain = (seen == seen[:, :1, :1, :1]).all(dim=(1, 2, 3))  # a blend of two plain images is plain
    assert 15 < plain.sum() < 55


# ---------------------------------------------------------------------------- patches left out


def seen_of(options, epoch=0):
    """What a model sees of 64 images, each of a single value, in patches of 2 x 2."""
    more = {"epochs": 10, "patch_dropout": 0.75, "whole_epochs": 4} | options
    return augmentation(**more)(NUMBERED * 4, ROWS % 10, ROWS, epoch, seed=5)


def test_a_quarter_of_the_patches_is_drawn_for_each_image_until_the_whole_epochs():
    kept = seen_of({}).kept
    assert kept.shape == (64, 6) and kept.min() == 0 and kept.max() == 23
    assert all(len(set(row)) == 6 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 50
    assert seen_of({}, epoch=5).kept is not None and seen_of({}, epoch=6).kept is None


@pytest.mark.parametrize("epoch", [0, 6])
def test_a_label_counts_for_its_share_of_the_pixels_that_the_model_sees(epoch):
    images, targets, kept = seen_of({"cutmix": 1.0}, epoch)
    kept = torch.arange(24).expand(64, 24) if kept is None else kept
    shares = []
    for row, (image, target) in enumerate(zip(images, targets, strict=True)):
        patches = [image[0, 2 * (k // 6) :][:2, 2 * (k % 6) :][:, :2] for k in kept[row].tolist()]
        own = (torch.stack(patches) == 4 * row).float().mean()
        expected = torch.zeros(10)
        expected[row % 10] += own
        expected[(row - 1) % 64 % 10] += 1 - own
        torch.testing.assert_close(target, expected)
        shares.append(own.item())
    assert max(shares) - min(shares) > 0.5
