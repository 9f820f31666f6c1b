"""Load concepts into pipelines of diffusers, and take them out again."""
from __future__ import annotations

import functools
import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.concept import Concept
from ldm.concepts.duals import add_duals
from ldm.concepts.fingerprint import check_base
from ldm.concepts.placeholders import PLACEHOLDER
from ldm.concepts.prompt_checks import warn_covariance_mismatch
from ldm.concepts.storage import read_concepts
from ldm.integrations.diffusers import processors, words
from ldm.integrations.diffusers.base_model import check_pipeline, describe_base, ldm_layer_names, uncompiled
from ldm.integrations.diffusers.loaded_concepts import LoadedConcepts
from ldm.integrations.diffusers.prompts import EncodeCall, encode_packed
from ldm.integrations.diffusers.words import Tower
from ldm.modules.covariance_files import load_covariance
from ldm.modules.rank_one import invert_covariance

log = logging.getLogger(__name__)

ConceptLike = str | Path | Concept


def load_concepts(pipe: DiffusionPipeline, concepts: ConceptLike | Sequence[ConceptLike] | LoadedConcepts = (),
                  covariance: str | Path | None = None) -> LoadedConcepts:
    """Load concepts into a pipeline of diffusers, so that prompts can name them.

        concepts = load_concepts(pipe, ["teddy.safetensors", "teapot.safetensors"])
        pipe("a <teddy> next to a <teapot>", negative_prompt="blurry")
        concepts.set(bias={"<teddy>": 0.6}, global_locking=True)
        unload_concepts(pipe)

    A prompt that names no concept gives exactly the image that it gives without this call. Calling it again adds
    concepts. A pipeline that `from_pipe` made shares the U-Net; call it on that one too: `load_concepts(img2img)`.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL.
        concepts: files, or `Concept` values. If two have the same placeholder, the later one is renamed to `<name-2>`,
            and a log line says so.
        covariance: file of the text encoder's covariance C, needed only by concept files of older formats.

    Returns:
        The loaded concepts, whose settings can be changed.

    Raises:
        UserError: a file is not a concept file, or belongs to another base model or method; or the pipeline is of
            another kind, or something in it that does not work with concepts.
    """
    check_pipeline(pipe)
    hooks = _hooks_of(pipe) or _hooks_on_unet(pipe) or Hooks()
    if isinstance(concepts, LoadedConcepts):
        given = [] if concepts is hooks.loaded else list(concepts.concepts)
    else:
        given = [concepts] if isinstance(concepts, ConceptLike) else list(concepts)
    if not given and not hooks.loaded.concepts:
        raise UserError("no concept is given; name at least one file")
    hooks.add(pipe, given, covariance)
    return hooks.loaded


def unload_concepts(pipe: DiffusionPipeline) -> None:
    """Take all concepts out of a pipeline, which then is what it was. Without concepts, nothing happens."""
    hooks = _hooks_of(pipe)
    if hooks is not None:
        hooks.remove(pipe)


class Hooks:
    """What one set of concepts has installed, in a pipeline or in several that share a U-Net.

    Attributes:
        loaded: the concepts.
    """

    def __init__(self) -> None:
        self.loaded = LoadedConcepts()
        self._pipelines: weakref.WeakSet[DiffusionPipeline] = weakref.WeakSet()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # U-Nets and ControlNets
        self._guards: dict[nn.Module, Any] = {}  # by text encoder
        self._is_encoding = False
        self._told: set[str] = set()

    def add(self, pipe: DiffusionPipeline, concepts: Sequence[ConceptLike], covariance: str | Path | None) -> None:
        """Add concepts to those that are loaded, and the pipeline to theirs. After an error, nothing has changed."""
        unet = uncompiled(pipe.unet)
        layers = processors.text_layers(unet)
        processors.check_processors(layers, self)
        names = ldm_layer_names(unet, layers)
        stored = read_concepts(concepts, self.loaded.stored)
        _check_concepts(pipe, stored, {names[path]: layer for path, layer in layers.items()})
        stored = add_duals(stored, functools.partial(_inverse_covariance, stored, covariance))
        warn_covariance_mismatch(stored)
        self.loaded.extend(stored, names)
        self._prepare(pipe)
        self._wrap(pipe)

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the concepts out of a pipeline; when it was the last one, out of its models too."""
        replaced = pipe.__dict__.pop("encode_prompt").replaced
        if replaced is not None:
            pipe.encode_prompt = replaced
        self._pipelines.discard(pipe)
        if not self._pipelines:
            for model in self._models:
                processors.uninstall(model, self)
            for guard in self._guards.values():
                guard.remove()
            self._guards.clear()

    def _wrap(self, pipe: DiffusionPipeline) -> None:
        """Put a function around the pipeline's `encode_prompt`, unless it is there."""
        self._pipelines.add(pipe)
        if _hooks_of(pipe) is not None:
            return
        pipe.encode_prompt = EditedEncodePrompt(self, pipe)

    def _prepare(self, pipe: DiffusionPipeline) -> None:
        """Install what is missing: models may have been exchanged, and other calls replace processors."""
        unet = uncompiled(pipe.unet)
        width = unet.config.cross_attention_dim
        for model, edits in ((unet, self.loaded.layer_edits), *((net, {}) for net in _controlnets(pipe))):
            layers = processors.text_layers(model)
            processors.check_processors(layers, self)
            processors.install(layers, width, edits, self)
            self._models.add(model)
        for tower in Tower.all_of(pipe):
            encoder = uncompiled(tower.encoder)
            if encoder not in self._guards:
                hook = functools.partial(self._refuse_unedited, tower.tokenizer)
                self._guards[encoder] = encoder.register_forward_pre_hook(hook, with_kwargs=True)

    def encode(self, pipe: DiffusionPipeline, original: Callable[..., Any], args: Sequence[Any],
               kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Do what `pipe.encode_prompt` does, under the edit of the concepts."""
        self._prepare(pipe)
        self.loaded.move_outputs(torch.device(pipe._execution_device), pipe.unet.dtype)
        call = EncodeCall(original, args, kwargs)
        self._warn_of_unknown_words(call.all_texts(), words.added_words(Tower.all_of(pipe)))
        with self._encoding():
            return tuple(encode_packed(pipe, call, self.loaded, uncompiled(pipe.unet).config.cross_attention_dim))

    # Prompts that a concept should act on, but does not

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        self._is_encoding = True
        try:
            yield
        finally:
            self._is_encoding = False

    def _refuse_unedited(self, tokenizer: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise UserError if a text encoder reads the word of a concept, but not for `encode_prompt`."""
        ids = args[0] if args else kwargs.get("input_ids")
        if self._is_encoding or torch.compiler.is_compiling() or not isinstance(ids, Tensor):
            return
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            for word in words.names_in_decoded(text, self.loaded.placeholders):
                raise UserError(f"a prompt names {word}, but was not encoded by a pipeline that has this concept; call "
                                "load_concepts on this pipeline too (from_pipe does not copy concepts), or encode "
                                "with pipe.encode_prompt")

    def _warn_of_unknown_words(self, texts: Sequence[str], added: set[str]) -> None:
        known = {fold_word(word) for word in self.loaded.placeholders} | added | self._told
        for word in (word for text in texts for word in re.findall(PLACEHOLDER, text)):
            if fold_word(word) not in known:
                self._told.add(fold_word(word))
                log.warning("warning: %s is not the word of a loaded concept; loaded are %s", word,
                            ", ".join(self.loaded.placeholders))


class EditedEncodePrompt:
    """What takes the place of a pipeline's `encode_prompt`. It does not keep the pipeline alive.

    Attributes:
        hooks: what installed it.
        replaced: what the pipeline itself, not its class, had under this name; None: nothing.
    """

    def __init__(self, hooks: Hooks, pipe: DiffusionPipeline) -> None:
        functools.update_wrapper(self, type(pipe).encode_prompt)
        self.hooks, self.replaced = hooks, pipe.__dict__.get("encode_prompt")
        self._pipe = weakref.ref(pipe)
        self.__signature__ = inspect.signature(pipe.encode_prompt)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        pipe = self._pipe()
        original = self.replaced or functools.partial(type(pipe).encode_prompt, pipe)
        return self.hooks.encode(pipe, original, args, kwargs)

    def __reduce__(self) -> NoReturn:
        raise UserError("a pipeline with concepts cannot be copied or pickled; call unload_concepts first, and load "
                        "the concepts into the copy")


def _hooks_of(pipe: DiffusionPipeline) -> Hooks | None:
    """Return what has concepts loaded into this very pipeline."""
    return getattr(pipe.__dict__.get("encode_prompt"), "hooks", None)


def _hooks_on_unet(pipe: DiffusionPipeline) -> Hooks | None:
    """Return what another pipeline with this U-Net has its concepts in."""
    for layer in processors.text_layers(uncompiled(pipe.unet)).values():
        if isinstance(getattr(layer.processor, "owner", None), Hooks):
            return layer.processor.owner
    return None


def _controlnets(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the ControlNets of a pipeline."""
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None:
        return []
    controlnet = uncompiled(controlnet)
    return [uncompiled(net) for net in getattr(controlnet, "nets", [controlnet])]


def _check_concepts(pipe: DiffusionPipeline, concepts: Sequence[Any], layers: dict[str, Any]) -> None:
    """Raise UserError if a concept does not fit the pipeline.

    Args:
        layers: name in concept files -> layer.
    """
    base, towers = describe_base(pipe, layers), Tower.all_of(pipe)
    added = words.added_words(towers)
    for concept in concepts:
        if not isinstance(concept, Concept):
            raise UserError(f"concept {concept.label} was learned by {concept.method_label}, but only Perfusion's load "
                            "here; load the words of others with pipe.load_textual_inversion")
        check_base(concept, base)
        if not concept.fits_layers(base.layers):
            raise UserError(f"concept {concept.label} does not fit the layers of this pipeline; load the model that it "
                            "was trained on")
        words.concept_vectors(towers, concept)
        if fold_word(concept.placeholder) in added:
            raise UserError(f"the pipeline's tokenizer already has the word {concept.placeholder}; call "
                            "pipe.unload_textual_inversion(), or rename the concept with merge_embeddings.py")


def _inverse_covariance(concepts: Sequence[Concept], covariance: str | Path | None) -> Tensor:
    """Return C^-1 for concepts without a dual vector.

    Raises:
        UserError: the file is not given, or is of another text encoder.
    """
    concept = next(concept for concept in concepts if concept.dual is None)
    if covariance is None:
        raise UserError(f"concept {concept.label} is of an older format, which needs the covariance of its text "
                        "encoder; give covariance=FILE, or convert it once with merge_embeddings.py")
    matrix = load_covariance(covariance)
    if len(matrix) != concept.context_width:
        raise UserError(f"{covariance}: for encodings of {len(matrix)} numbers, but concept {concept.label} has "
                        f"{concept.context_width}; give that of its text encoder")
    return invert_covariance(matrix)
