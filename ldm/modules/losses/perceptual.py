"""LPIPS, a perceptual distance between images, on VGG16's features.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), equation 1.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.load import read_state_dict
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path

SOURCES = {  # file name -> what the file is; the names are the authors'
    "vgg16-397923af.pth": "torchvision's VGG16 weights (IMAGENET1K_V1)",
    "vgg.pth": "LPIPS 0.1's weights for VGG (weights/v0.1/vgg.pth of richzhang/PerceptualSimilarity)",
}
# Indices of the convolutions in torchvision's `vgg16().features`, block by block. A ReLU follows each convolution, and
# a 2x2 max pooling separates the blocks. LPIPS compares the outputs of the blocks.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's pixels in [-1, 1]


class LPIPS(nn.Module):
    """The LPIPS distance between images.

    The weights are buffers that are not saved in checkpoints: they never change, and training reads them from files.

    Args:
        vgg: VGG16's weights, `features.<index>.weight` and `features.<index>.bias`.
        linear: the weight of each feature, `lin<block>.model.1.weight`, (1, channels, 1, 1).
    """

    def __init__(self, vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        super().__init__()
        constants = {"mean": torch.tensor(MEAN).view(3, 1, 1), "std": torch.tensor(STD).view(3, 1, 1)}
        for block, convolutions in enumerate(BLOCKS):
            constants[f"linear{block}"] = linear[f"lin{block}.model.1.weight"]
            for index in convolutions:
                for kind in ("weight", "bias"):
                    constants[f"{kind}{index}"] = vgg[f"features.{index}.{kind}"]
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> LPIPS:
        """Load the files that `SOURCES` names from a folder.

        Raises:
            UserError: if a file is missing, or holds other weights.
        """
        paths = [resolve_path(folder) / name for name in SOURCES]
        for path, source in zip(paths, SOURCES.values(), strict=True):
            if not path.is_file():
                raise UserError(f"{path}: the perceptual loss needs this file, {source}; put it there, or set "
                                "model.params.lossconfig.params.perceptual_weight=0 to train without")
        vgg, linear = map(read_state_dict, paths)
        try:
            return cls(vgg, linear)
        except KeyError as error:
            raise UserError(f"{folder}: {' or '.join(SOURCES)} holds other weights ({error.args[0]} is missing); "
                            "download it again") from None

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """Compute the output of each block for images (B, 3, H, W) in [-1, 1], normalized over channels."""
        x = (images - self.mean) / self.std
        for block, convolutions in enumerate(BLOCKS):
            x = F.max_pool2d(x, 2) if block else x
            for index in convolutions:
                weight, bias = getattr(self, f"weight{index}"), getattr(self, f"bias{index}")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def forward(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Compute distances (B, 1, 1, 1). Gradients reach the reconstructions only.

        Source: Zhang et al., equation 1.
        """
        with torch.no_grad():
            targets = list(self.features(inputs))
        distance: Tensor | int = 0
        for block, (target, feature) in enumerate(zip(targets, self.features(reconstructions), strict=True)):
            weighted = F.conv2d((target - feature).square(), getattr(self, f"linear{block}"))
            distance = distance + weighted.mean((2, 3), keepdim=True)
        return distance
