"""Augmentation of images and masks: the same for both, and no more than requested."""
from __future__ import annotations

import torch

from ldm.data.mini.augmentation import MaskedAugmentation


def blobs(count: int = 6, side: int = 32) -> torch.Tensor:
    """(count, 2, side, side): two soft blobs in each, away from the border."""
    rows = torch.linspace(-1, 1, side)
    distance = ((rows[:, None] - 0.2) ** 2 + rows**2).sqrt()
    return torch.stack([torch.sigmoid(8 * (0.4 - distance)), torch.sigmoid(8 * (0.3 - distance.flip(0)))])[None].expand(
        count, -1, -1, -1)


def test_a_mask_moves_with_its_subject() -> None:
    torch.manual_seed(0)
    masks = blobs()
    images = masks[:, :1].expand(-1, 3, -1, -1) * 2 - 1  # gray: hue and saturation change nothing
    augmented, moved = MaskedAugmentation(1.0)(images, masks)
    assert augmented.shape == images.shape and moved.shape == masks.shape
    assert augmented.min() >= -1 and augmented.max() <= 1 and moved.min() >= 0 and moved.max() <= 1
    for image, mask, before in zip(augmented[:, 0], moved[:, 0], masks[:, 0], strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), mask.flatten()]))[0, 1] > 0.97
        assert (mask - before).abs().mean() > 0.01
    assert not torch.allclose(moved[0], moved[1], atol=0.05)


def test_colors_change_per_image_and_depend_on_the_seed() -> None:
    images = torch.tensor([0.8, -0.2, -0.7]).reshape(1, 3, 1, 1).expand(8, 3, 16, 16)
    masks = torch.zeros(8, 2, 16, 16)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(MaskedAugmentation(1.0)(images, masks)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    middles = made[0][:, :, 8, 8]
    assert (middles[:, None] - middles).abs().sum(-1).gt(0.1).sum() > 40  # of 56 pairs


def test_with_probability_zero_images_are_only_mirrored() -> None:
    torch.manual_seed(3)
    masks = torch.rand(16, 2, 8, 8)
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    augmented, moved = MaskedAugmentation(0.0)(images, masks)
    mirrored = [torch.allclose(moved[index], masks[index].flip(-1)) for index in range(16)]
    for index, is_mirrored in enumerate(mirrored):
        expected = images[index].flip(-1) if is_mirrored else images[index]
        torch.testing.assert_close(augmented[index], expected, atol=1e-5, rtol=0)
    assert 2 < sum(mirrored) < 14
