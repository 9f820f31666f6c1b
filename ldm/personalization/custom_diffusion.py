"""Custom Diffusion: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion" (CVPR 2023).

arXiv 2212.04488. Of the U-Net only W_K and W_V of cross-attention are trained (there Sec. 3.1), and with them the
embedding of a modifier in front of the super-category.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.personalization.prior_preservation import PriorPreservation


class CustomDiffusion(PriorPreservation):
    """A model that learns W_K and W_V of cross-attention and the first vector of the concept's word.

    Params are those of `PriorPreservation`. Concepts that were learned apart are merged by
    `ldm.concepts.finetuned_prompt_encoder.merged_weights`.
    """

    method = "custom-diffusion"
    learns_word = True

    def trained_unet_weights(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{part}.weight": getattr(layer, part).weight
                for name, layer in self.text_layers.items() for part in ("to_k", "to_v")}

    @torch.no_grad()
    def word_inputs(self) -> Tensor:
        encoding = self.cond_stage_model.encode_tokens(self._tokens, self.concepts[0]())
        return encoding[self.concept_positions(self._tokens)].unflatten(0, (len(self._tokens), -1)).mean(0)
