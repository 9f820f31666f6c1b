"""CLIP's text tower (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021)."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.common.errors import UserError, brief_reason
from ldm.common.hub import check_model_name
from ldm.common.paths import PROJECT_ROOT, resolve_path
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.encoders.vocabulary import load_pretrained

TOKENIZER = PROJECT_ROOT / "models" / "clip_tokenizer"
# Text towers whose weights are in Stable Diffusion checkpoints: they are built by name, without a download.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu"},
}


class ClipWords(PromptEncoder):
    """Base class of encoders that read CLIP's word pieces, which mark the end of a word."""

    def _whole_words(self) -> dict[str, int]:
        ending = "</w>"
        return {piece.removesuffix(ending): index for piece, index in self.tokenizer.get_vocab().items()
                if piece.endswith(ending)}


class FrozenCLIPEmbedder(ClipWords):
    """Encode prompts by the text tower of a CLIP, to (B, max_length, d).

    Args:
        version: a folder with config.json (and with weights, unless a checkpoint holds them), or a hub name.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        max_length: number of tokens per prompt, start and end tokens included.
        freeze: whether to take the tower's parameters out of training.
        layer: "last"; or "hidden" to take the output of layer `layer_idx` without the final norm; or "pooled" to take
            the encoding of the end token alone, (B, 1, d).
        layer_idx: index of that layer: 0 is the input of the first layer, -1 the output of the last one.

    Raises:
        UserError: if there is no such tower, it is incomplete, or it has no such layer or fewer positions.
    """

    LAYERS = ("last", "pooled", "hidden")

    def __init__(self, version: str = "openai/clip-vit-large-patch14", device: str = "cuda", max_length: int = 77,
                 freeze: bool = True, layer: str = "last", layer_idx: int | None = None) -> None:
        super().__init__()
        if layer not in self.LAYERS or (layer == "hidden") != (layer_idx is not None):
            raise UserError(f"FrozenCLIPEmbedder: layer {layer!r} with layer_idx {layer_idx}; "
                            "give 'last' or 'pooled' alone, or 'hidden' with a number")
        self.max_length, self.layer, self.layer_idx = max_length, layer, layer_idx
        self.tokenizer, self.transformer, self.awaits_weights = _clip_tower(version)
        # Public code reaches the tower's parts by `transformer.text_model`, which transformers 5 dropped.
        if not hasattr(self.transformer, "text_model"):
            object.__setattr__(self.transformer, "text_model", self.transformer)  # a plain reference, not a submodule
        self._check_fit(version)
        self.register_state_dict_post_hook(_rename_to_compvis)
        self.register_load_state_dict_pre_hook(_rename_to_installed)
        if freeze:
            self.freeze()

    def _check_fit(self, version: str) -> None:
        """Raise UserError if tokenizer, tower and arguments do not fit together."""
        config = self.transformer.config
        if self.max_length > config.max_position_embeddings:
            raise UserError(f"text encoder {version!r} takes {config.max_position_embeddings} tokens; "
                            f"lower max_length ({self.max_length})")
        if len(self.tokenizer) > config.vocab_size:
            raise UserError(f"text encoder {version!r}: its tokenizer knows {len(self.tokenizer)} word pieces, its "
                            f"model {config.vocab_size}; give a folder with files that belong together")
        layers = config.num_hidden_layers
        if self.layer_idx is not None and self.layer_idx not in range(-layers - 1, layers + 1):
            raise UserError(f"text encoder {version!r} has {layers} layers, and no layer_idx {self.layer_idx}; "
                            f"choose one from 0 to {layers}")

    @property
    def token_table(self) -> Tensor:
        return self.transformer.get_input_embeddings().weight

    @property
    def word_parts(self) -> dict[str, int]:
        return {"clip_l": self.token_table.shape[1]}

    def _special_tokens(self) -> tuple[int, int, int]:
        end = self.tokenizer.eos_token_id
        return self.tokenizer.bos_token_id, end, end

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        """See `PromptEncoder`.

        The tower of `transformers` takes token indices only. So it is called with a table in which every token of the
        batch has a row of its own.
        """
        name = next(n for n, parameter in self.transformer.named_parameters() if parameter is self.token_table)
        table = embedded.flatten(0, 1)
        indices = torch.arange(len(table), device=table.device).view(embedded.shape[:2])
        output = functional_call(self.transformer, {name: table}, kwargs={
            "input_ids": indices, "output_hidden_states": self.layer_idx is not None})
        return output.last_hidden_state if self.layer_idx is None else output.hidden_states[self.layer_idx]

    def _encode_embedded(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        encoded = super()._encode_embedded(embedded, tokens)
        if self.layer != "pooled":
            return encoded
        end_positions = (tokens == self.tokenizer.eos_token_id).int().argmax(1)  # the first end token of each prompt
        return encoded[torch.arange(len(tokens)), end_positions][:, None]


def _clip_tower(version: str) -> tuple[CLIPTokenizer, CLIPTextModel, bool]:
    """Return the tokenizer and the tower that `version` names: a known tower, a folder, or a model on the hub.

    The last value tells whether the tower still needs the weights of a checkpoint.
    """
    folder = resolve_path(version)
    try:
        if version in KNOWN_TOWERS and not Path(version).is_dir():
            tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
            config = CLIPTextConfig(**KNOWN_TOWERS[version], **special_tokens(tokenizer))
            # The public encoder loads weights and draws no random numbers, on which the images of a seed depend.
            with torch.random.fork_rng(devices=[]):
                return tokenizer, CLIPTextModel(config), True
        if (folder / "config.json").is_file():
            tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
                return tokenizer, load_pretrained(CLIPTextModel, folder), False
            return tokenizer, CLIPTextModel(CLIPTextConfig.from_pretrained(folder)), True
        check_model_name("text encoder", version, "give a local folder")
        model = load_pretrained(CLIPTextModel, version)  # first, since it retries least without a network
        return CLIPTokenizer.from_pretrained(version), model, False
    except (OSError, ValueError) as error:
        reason = brief_reason(error)
        raise UserError(f"text encoder {version!r} cannot be loaded ({reason}); give a local folder") from None


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder of a model's tokenizer: the model's folder, or else CLIP's tokenizer in this project."""
    has_tokenizer = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    return folder if has_tokenizer else TOKENIZER


def special_tokens(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return the settings of a text tower's config that depend on its tokenizer."""
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}


# CompVis's checkpoints name the tower's keys `transformer.text_model.…`; transformers 5 dropped `text_model.`.
_COMPVIS, _SHORT = "transformer.text_model.", "transformer."


def _rename_to_compvis(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the keys of a state dict that is saved, as in CompVis's checkpoints."""
    for key in [key for key in state if key.startswith(prefix + _SHORT)]:
        if not key.startswith(prefix + _COMPVIS):
            state[prefix + _COMPVIS + key.removeprefix(prefix + _SHORT)] = state.pop(key)


def _rename_to_installed(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the keys of a state dict that is loaded, as the installed version of transformers has them."""
    installed = any(name.startswith("text_model.") for name, _ in module.transformer.named_parameters())
    for key in [key for key in state if key.startswith(prefix + _SHORT)]:
        rest = key.removeprefix(prefix + _COMPVIS).removeprefix(prefix + _SHORT)
        value = state.pop(key)
        if rest.split(".")[-1] != "position_ids":
            state[prefix + (_COMPVIS if installed else _SHORT) + rest] = value
