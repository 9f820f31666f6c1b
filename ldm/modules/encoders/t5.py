"""The text encoder T5 (Raffel et al., JMLR 2020), and T5 beside CLIP, as Stability's code has them."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from ldm.common.errors import UserError, brief_reason
from ldm.common.hub import check_model_name
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import AbstractEncoder, OnDeviceOfWeights


class FrozenT5Embedder(OnDeviceOfWeights, AbstractEncoder):
    """Encode texts to (B, max_length, d). Longer texts are cut off.

    Args:
        version: a folder or hub name of a T5.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        max_length: number of tokens per text.
        freeze: whether to take all parameters out of training.

    Raises:
        UserError: if there is no such model.
    """

    def __init__(self, version: str = "google/t5-v1_1-large", device: str = "cuda", max_length: int = 77,
                 freeze: bool = True) -> None:
        super().__init__()
        if "/" in version:  # the hub's oldest models have names of one word
            check_model_name("text encoder", version, "give a local folder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(version)
            self.transformer = T5EncoderModel.from_pretrained(version)
        except (OSError, ValueError) as error:
            reason = brief_reason(error)
            raise UserError(f"text encoder {version!r} cannot be loaded ({reason}); give a local folder") from None
        self.max_length = max_length
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """Take all parameters out of training."""
        self.requires_grad_(False).eval()

    def forward(self, text: Sequence[str] | str) -> Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding="max_length",
                                return_tensors="pt")["input_ids"]
        return self.transformer(input_ids=tokens.to(self.device)).last_hidden_state


class FrozenCLIPT5Encoder(AbstractEncoder):
    """Encode texts by CLIP and by T5, to a list of both encodings.

    Args:
        clip_version, clip_max_length: as for `FrozenCLIPEmbedder`.
        t5_version, t5_max_length: as for `FrozenT5Embedder`.
        device: ignored, kept for the public configs.
    """

    def __init__(self, clip_version: str = "openai/clip-vit-large-patch14", t5_version: str = "google/t5-v1_1-xl",
                 device: str = "cuda", clip_max_length: int = 77, t5_max_length: int = 77) -> None:
        super().__init__()
        self.clip_encoder = FrozenCLIPEmbedder(clip_version, device, max_length=clip_max_length)
        self.t5_encoder = FrozenT5Embedder(t5_version, device, max_length=t5_max_length)

    def forward(self, text: Sequence[str] | str) -> list[Tensor]:
        return [self.clip_encoder.encode(text), self.t5_encoder.encode(text)]
