"""How different two pictures look: LPIPS on VGG16's features.

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

SOURCES = {  # file: what it is, under the name that its authors gave it
    "vgg16-397923af.pth": "torchvision's VGG16 weights (IMAGENET1K_V1)",
    "vgg.pth": "LPIPS 0.1's weights for VGG (weights/v0.1/vgg.pth of richzhang/PerceptualSimilarity)",
}
# The convolutions' places in torchvision's `vgg16().features`, block by block: each is followed by a ReLU, and blocks
# are parted by a 2x2 max pooling. What a block ends in is compared.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's pixels, on a scale of -1 to 1


class LPIPS(nn.Module):
    """The distance between pictures, read from two files of weights; of any width, as the weights have it.

    Weights are buffers that no checkpoint holds: they never change, and whoever trains has the files.

    Args:
        vgg: `features.<place>.weight` and `.bias` of VGG16.
        linear: `lin<block>.model.1.weight`, (1, channels, 1, 1), how much each feature counts.
    """

    def __init__(self, vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        super().__init__()
        constants = {"mean": torch.tensor(MEAN).view(3, 1, 1), "spread": torch.tensor(SPREAD).view(3, 1, 1)}
        for block, places in enumerate(BLOCKS):
            constants[f"linear{block}"] = linear[f"lin{block}.model.1.weight"]
            for place in places:
                constants |= {f"{kind}{place}": vgg[f"features.{place}.{kind}"] for kind in ("weight", "bias")}
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> LPIPS:
        """The network of the files that `SOURCES` names.

        Raises:
            UserError: one of them is missing, or is something else.
        """
        paths = [Path(folder) / name for name in SOURCES]
        for path, source in zip(paths, SOURCES.values(), strict=True):
            if not path.is_file():
                raise UserError(f"{path}: the perceptual loss needs this file, {source}; put it there, or set "
                                "model.params.lossconfig.params.perceptual_weight=0 to train without")
        vgg, linear = map(read_state_dict, paths)
        try:
            return cls(vgg, linear)
        except KeyError as error:
            raise UserError(f"{folder}: {' or '.join(SOURCES)} is another network's (no {error.args[0]} in it); "
                            "download it again") from None

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """What each block gives for pictures (B, 3, H, W) in [-1, 1], scaled to length 1 over channels."""
        x = (images - self.mean) / self.spread
        for block, places in enumerate(BLOCKS):
            x = F.max_pool2d(x, 2) if block else x
            for place in places:
                weight, bias = getattr(self, f"weight{place}"), getattr(self, f"bias{place}")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)

    def forward(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """(B, 1, 1, 1) distances; gradients reach the reconstructions only."""
        with torch.no_grad():
            targets = list(self.features(inputs))
        pairs = enumerate(zip(targets, self.features(reconstructions), strict=True))
        return sum(F.conv2d((target - found).square(), getattr(self, f"linear{block}")).mean((2, 3), keepdim=True)
                   for block, (target, found) in pairs)
