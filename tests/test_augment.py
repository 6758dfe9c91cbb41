"""Augmentation against torchvision's own operations, image by image."""

import pytest
import torch
import torchvision.transforms.v2.functional as reference

from augment import random_crop, random_flip


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 8, 12), dtype=torch.uint8, generator=generator(0))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_each_image_is_itself_or_its_mirror_image_about_half_of_the_time(images):
    flipped = random_flip(images, generator(1))
    mirrored = [
        torch.equal(after, reference.horizontal_flip(before))
        for before, after in zip(images, flipped, strict=True)
    ]
    same = [torch.equal(*pair) for pair in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 20 < sum(mirrored) < 44


def test_each_image_is_some_crop_of_its_padded_self(images):
    padding = 2
    cropped = random_crop(images, padding, generator(1))
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    places = []
    for before, after in zip(images, cropped, strict=True):
        padded = reference.pad(before, [padding])
        found = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(after, reference.crop(padded, top, left, 8, 12))
        ]
        assert len(found) == 1
        places += found
    assert {top for top, _ in places} == {left for _, left in places} == set(range(2 * padding + 1))


@pytest.mark.parametrize("operation", [random_flip, lambda x, g: random_crop(x, 4, g)])
def test_the_same_generator_state_gives_the_same_images(images, operation):
    assert torch.equal(operation(images, generator(3)), operation(images, generator(3)))
    assert not torch.equal(operation(images, generator(3)), operation(images, generator(4)))
