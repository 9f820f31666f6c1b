"""Custom Diffusion: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion" (CVPR 2023).

arXiv 2212.04488. Of the U-Net, only W_K and W_V of cross-attention are trained (Sec. 3.1), together with the embedding
of a modifier in front of the super-category.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.personalization.prior_preservation import PriorPreservation


class CustomDiffusion(PriorPreservation):
    """A model that learns W_K and W_V of cross-attention and the first vector of the concept's word.

    It takes the params of `PriorPreservation`. `ldm.concepts.weight_merging` merges concepts of separate runs.
    """

    method = "custom-diffusion"
    method_name = "Custom Diffusion"
    trains_word = True

    def trained_unet_weights(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{projection}.weight": getattr(layer, projection).weight
                for name, layer in self.text_layers.items() for projection in ("to_k", "to_v")}

    @torch.no_grad()
    def average_word_encodings(self) -> Tensor:
        tokens = self._training_tokens
        encoding = self.cond_stage_model.encode_tokens(tokens, self.concepts[0]())
        return encoding[self.concept_positions(tokens)].unflatten(0, (len(tokens), -1)).mean(0)
