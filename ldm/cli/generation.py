"""Flags of the generation scripts, and the dataclasses that they become.

Imports no torch, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints.early_checks import check_concept, check_lora, check_model_files
from ldm.cli.parser import add_part_flags, float_in_range, int_in_range
from ldm.common.errors import UserError
from ldm.common.hub import check_clip_name, check_model_name
from ldm.common.paths import PROJECT_ROOT, check_folder, expand_home, resolve_path
from ldm.common.prompt_file import read_prompt_file
from ldm.common.words import super_category_words
from ldm.inference.requests import SEED_LIMIT
from ldm.inference.settings import (
    AUTO,
    GenerationOptions,
    GenerationSettings,
    LoraFile,
    ModelSettings,
    PhotoSettings,
    SourceSettings,
)
from ldm.sampling.samplers import SAMPLERS, describe_samplers
from ldm.sampling.spacings import TIMESTEP_SPACINGS, describe_spacings

DEFAULT_CONFIG = "models/mini/config.yaml"
ONE_OR_EACH = "one for all concepts, or one for each in the order of the files"
NO_SEGMENTER = "none"  # leaves out what segments, in evaluations
BY_MODEL = "default: what the model's config says, or else"


def add_generation_flags(parser: argparse.ArgumentParser, outdir: str) -> None:
    """Add the flags that all generation scripts share."""
    add_prompt_flags(parser)
    add_concept_flags(parser, automatic=True)
    add_sampling_flags(parser)
    add_amount_flags(parser)
    add_model_flags(parser, outdir)


def add_source_flags(parser: argparse.ArgumentParser, strength: float, meaning: str) -> argparse._ArgumentGroup:
    """Add the flags of an image to start from; return their group, to which a script may add its own.

    Args:
        strength: the default.
        meaning: help text of `--strength`.
    """
    group = parser.add_argument_group("image to start from")
    group.add_argument("--init-img", "--init_img", dest="init_img", required=True, type=expand_home,
                       metavar="FILE", help="image of any size; its middle is used, in the proportions of --W and --H")
    group.add_argument("--strength", type=float_in_range(above=0, most=1), default=strength, metavar="NUMBER",
                       help=f"{meaning} (default: %(default)s)")
    return group


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of prompts."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT",
                       help="one prompt or several, each in quotes")
    group.add_argument("--from-file", "--from_file", dest="from_file", type=expand_home, metavar="FILE",
                       help="text file with one prompt per line; these come after those of --prompt. {} is the "
                       "concept's word; lines such as [style], blank ones and those that start with # are left out")
    group.add_argument("--no_prompt_weights", action="store_true",
                       help="read (word:1.3), ((word)) and [word] literally; otherwise they weight words as in "
                       "AUTOMATIC1111's web UI")
    group.add_argument("--negative_prompt", nargs="+", action="extend", default=[], metavar="TEXT",
                       help="what guidance steers away from, in place of the empty prompt; one for all prompts, or one "
                       "for each")


def number_or_auto(text: str) -> float | str:
    """Read a flag's value: a finite number, or `AUTO`."""
    return text if text == AUTO else float_in_range()(text)


def add_concept_flags(parser: argparse.ArgumentParser, automatic: bool = False) -> None:
    """Add the flags of concepts; with those of `--bias auto` if that is `automatic`."""
    group = parser.add_argument_group("concepts")
    group.add_argument("--concept", "--embedding_path", dest="concept", nargs="+", action="extend", default=[],
                       type=expand_home, metavar="FILE",
                       help="concept files, each of one concept or merged from several; without this "
                       "flag the base model generates alone")
    auto = "; auto finds a balance by a small sweep and prints it" if automatic else ""
    group.add_argument("--bias", nargs="+", type=number_or_auto if automatic else float_in_range(), metavar="NUMBER",
                       help=f"beta: higher follows the prompt more and the concept less; {ONE_OR_EACH}. 0.6 to 0.75 is "
                       f"usual, with --global_locking 0.4 to 0.6{auto} (default: the concept's own)")
    group.add_argument("--temperature", nargs="+", type=float_in_range(above=0), metavar="NUMBER",
                       help=f"tau: how softly the gate opens; {ONE_OR_EACH}. 0.15 is usual (default: the concept's "
                       "own)")
    group.add_argument("--global_locking", action="store_true",
                       help="lock the keys of the whole prompt, not only those of the concept's word, to the "
                       "super-category")
    group.add_argument("--all_layers", action="store_true",
                       help="use the learned values of all layers, for concepts that use only some: closer to the "
                       "photos if the subject is alone")
    if automatic:
        group.add_argument("--clip", type=expand_home, metavar="NAME",
                           help="CLIP that --bias auto measures with: a folder of "
                           "transformers or open_clip, or ARCHITECTURE/WEIGHTS of open_clip such as ViT-B-32/openai "
                           "(default: the model's)")
        group.add_argument("--photos", type=expand_home, metavar="FOLDER", help="with --init_word: photos of a subject "
                           "to predict a concept from, without training; its word in prompts is "
                           f"{PhotoSettings.placeholder}. With --bias auto: the concept's photos to compare with "
                           "(default: images generated with the lowest bias)")
        group.add_argument("--init_word", metavar="WORDS", help='what kind of subject --photos show, such as "teddy '
                           'bear"')
        group.add_argument("--masks", type=expand_home, metavar="FOLDER", help="masks of these photos, white where "
                           "the subject is (default: it is segmented)")
        group.add_argument("--encoder", type=expand_home, metavar="FOLDER", help="the encoder that predicts the "
                           "concept (default: the model's)")
        group.add_argument("--encoder_strength", type=float_in_range(above=0), metavar="NUMBER", help="how strong the "
                           "look of the photos is (default: the encoder's own)")


def leave_concepts_as_trained(parser: argparse.ArgumentParser) -> None:
    """Set the defaults of `add_concept_flags` and negative prompts, for a script without these flags."""
    parser.set_defaults(bias=None, temperature=None, global_locking=False, all_layers=False, negative_prompt=[])


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sampling."""
    group = parser.add_argument_group("sampling")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--sampler", choices=tuple(SAMPLERS),
                       help=f"{describe_samplers()} ({BY_MODEL} ddim)")
    which.add_argument("--plms", action="store_const", dest="sampler", const="plms", default=argparse.SUPPRESS,
                       help="short for --sampler plms")
    group.add_argument("--ddim_steps", "--steps", dest="ddim_steps", type=int_in_range(1), metavar="N",
                       help=f"sampling steps, of any sampler ({BY_MODEL} 50)")
    group.add_argument("--ddim_eta", type=float_in_range(0, 1), metavar="NUMBER",
                       help="noise added in each step, from 0, none, to 1; for ddim (default: 0), tcd (0.3), and "
                       "euler_a, dpmpp_2m_sde, dpmpp_sde and lcm (1)")
    group.add_argument("--scale", type=float_in_range(0), metavar="NUMBER",
                       help=f"guidance: 1 is none, higher follows the prompt more closely ({BY_MODEL} 6)")
    group.add_argument("--guidance_rescale", type=float_in_range(0, 1), metavar="NUMBER",
                       help="take back the contrast that guidance adds, from 0, nothing, to 1, all; 0.7 is usual for "
                       f"models with zero terminal SNR ({BY_MODEL} 0)")
    group.add_argument("--timestep_spacing", choices=tuple(TIMESTEP_SPACINGS),
                       help=f"where the sampling steps are: {describe_spacings()} ({BY_MODEL} the sampler's own)")
    group.add_argument("--seed", type=int_in_range(0, SEED_LIMIT), default=1, metavar="N",
                       help="seed of each prompt's first image; each further image adds 1 (default: 1)")


def add_amount_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how many images, and of which size."""
    group = parser.add_argument_group("amount and size")
    group.add_argument("--n_samples", type=int_in_range(1), default=4, metavar="N",
                       help="images per prompt (default: 4)")
    group.add_argument("--n_iter", type=int_in_range(1), default=1, metavar="N",
                       help="multiply that number of images, with further seeds (default: 1)")
    group.add_argument("--batch_size", type=int_in_range(1), metavar="N",
                       help="images generated at a time; fewer take less memory (default: as --n_samples)")
    group.add_argument("--H", type=int_in_range(1), metavar="PIXELS", help="height (default: the model's)")
    group.add_argument("--W", type=int_in_range(1), metavar="PIXELS", help="width (default: the model's)")
    pixels, least = ("HEIGHT", "WIDTH"), int_in_range(1)
    group.add_argument("--original_size", nargs=2, type=least, metavar=pixels,
                       help="for models that read sizes, such as Stable Diffusion XL: the size that a photo like the "
                       "image had at first (default: --H and --W)")
    group.add_argument("--crop_coords", nargs=2, type=int_in_range(0), metavar=("TOP", "LEFT"), help="likewise: how "
                       "much a crop has cut off above and to the left (default: 0 0)")
    group.add_argument("--target_size", nargs=2, type=least, metavar=pixels, help="likewise: size after the crop "
                       "(default: --H and --W)")


def add_model_flags(parser: argparse.ArgumentParser, outdir: str) -> None:
    """Add the flags of the base model, the machine and the output."""
    group = parser.add_argument_group("base model, machine, output")
    group.add_argument("--config", type=expand_home, default=DEFAULT_CONFIG, metavar="FILE",
                       help="the base model's config (default: %(default)s)")
    group.add_argument("--ckpt", type=expand_home, metavar="FILE",
                       help=".safetensors, .ckpt or diffusers folder of the base model (default: the config's)")
    add_part_flags(group)
    group.add_argument("--lora", nargs="+", action="extend", default=[], type=LoraFile.parse, metavar="FILE[:SCALE]",
                       help="LoRAs to add to the weights, each with its scale (default: 1)")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ... (default: the fastest there is)")
    group.add_argument("--precision", choices=("full", "autocast"),
                       help="autocast: sample in 16 bits, full: in 32 (default: autocast on cuda, full elsewhere)")
    group.add_argument("--outdir", type=expand_home, default=outdir, metavar="FOLDER",
                       help="folder to write to (default: %(default)s)")


def check_base_model(options: argparse.Namespace) -> None:
    """Raise UserError if the config is none, or the base model's file, by its header, is not one that fits it."""
    config = resolve_path(options.config)
    if not config.is_file():
        raise UserError(f"--config {options.config}: no such file; those of this project are in "
                        f"{PROJECT_ROOT / 'configs'}")
    from omegaconf import OmegaConf  # --help need not wait for these

    from ldm.inference.model_config import read_model_config

    described = OmegaConf.to_container(read_model_config(config), resolve=False)
    check_model_files("--ckpt", options.ckpt, described, options.vae, options.text_encoder)


def check_flags(options: argparse.Namespace) -> None:
    """Raise UserError if flags contradict each other or name files and folders that cannot be used."""
    given = {"--bias": options.bias, "--temperature": options.temperature, "--global_locking": options.global_locking,
             "--all_layers": options.all_layers}
    unused = [flag for flag, value in given.items() if value]
    if unused and not options.concept and getattr(options, "init_word", None) is None:
        raise UserError(f"{unused[0]} acts on learned concepts; name a file of one with --concept")
    if options.negative_prompt and options.scale == 1:
        raise UserError("--negative_prompt acts through guidance, and --scale 1 is none; raise --scale")
    check_base_model(options)
    for lora in options.lora:
        check_lora(lora.path)
    for concept in options.concept:
        check_concept(concept)
    _check_inputs(options)
    check_folder("--outdir", Path(options.outdir))


def _check_inputs(options: argparse.Namespace) -> None:
    """Raise UserError if images or helper models that the command's flags name cannot be had."""
    for flag, name in (("--init-img", "init_img"), ("--mask", "mask")):
        path = getattr(options, name, None)
        if path is not None and not resolve_path(path).is_file():
            raise UserError(f"{flag} {path}: no such file; give an image")
    if getattr(options, "clip", None) is not None:
        check_clip_name("CLIP", options.clip)
    if getattr(options, "segmenter", None) not in (None, NO_SEGMENTER):
        check_model_name("segmenter", options.segmenter, "give a folder with a CLIPSeg model")


def check_generation_flags(options: argparse.Namespace) -> None:
    """Check the flags of `add_generation_flags` as `check_flags` does."""
    check_flags(options)
    automatic = AUTO in (options.bias or [])
    if options.clip is not None and not automatic:
        raise UserError(f"--clip requires --bias {AUTO}; add it, or leave --clip out")
    if options.photos is not None and not automatic and options.init_word is None:
        raise UserError(f"--photos requires --bias {AUTO}, to compare with them, or --init_word WORDS, what they show, "
                        "to predict a concept from them")
    _check_photo_flags(options)
    if options.photos is not None and not resolve_path(options.photos).is_dir():
        raise UserError(f"--photos {options.photos}: no such folder; give the one that holds the concept's photos")


def _check_photo_flags(options: argparse.Namespace) -> None:
    """Raise UserError if flags that predict a concept from photos miss another one, or name no folder."""
    given = {"--masks": options.masks, "--encoder": options.encoder, "--encoder_strength": options.encoder_strength}
    for flag, value in given.items():
        if value is not None and options.init_word is None:
            raise UserError(f"{flag} is for concepts that are predicted from photos; add --photos and --init_word, or "
                            f"leave {flag} out")
    if options.init_word is None:
        return
    super_category_words(options.init_word)  # raises if it is none
    if options.photos is None:
        raise UserError("--init_word requires --photos FOLDER, with photos of the subject; add it, or leave "
                        "--init_word out")
    for flag in ("--masks", "--encoder"):
        if given[flag] is not None and not resolve_path(given[flag]).is_dir():
            raise UserError(f"{flag} {given[flag]}: no such folder")


def generation_options(options: argparse.Namespace, source: SourceSettings | None = None) -> GenerationOptions:
    """Turn the flags of `add_generation_flags` into a dataclass, with the prompts of all files read.

    Raises:
        UserError: there is no prompt, its file cannot be read, or the negative prompts do not fit.
    """
    prompts = read_prompts(options.prompt, options.from_file)
    negatives = tuple(prompt.strip() for prompt in options.negative_prompt)
    if len(negatives) not in (0, 1, len(prompts)):
        raise UserError(f"--negative_prompt: {len(negatives)} of them for {len(prompts)} prompts; give one for all or "
                        "one for each")
    return GenerationOptions(
        prompts=tuple(prompts), negative_prompts=negatives, model=model_settings(options), outdir=options.outdir,
        concepts=tuple(options.concept), settings=generation_settings(options), seed=options.seed,
        num_images=options.n_iter * options.n_samples, columns=options.n_samples,
        batch_size=options.batch_size or options.n_samples, source=source, clip=options.clip,
        photos=options.photos if AUTO in (options.bias or []) else None, subject=_photo_settings(options))


def _photo_settings(options: argparse.Namespace) -> PhotoSettings | None:
    if options.init_word is None:
        return None
    return PhotoSettings(options.photos, options.init_word, encoder=options.encoder, strength=options.encoder_strength,
                         masks=options.masks)


def generation_settings(options: argparse.Namespace) -> GenerationSettings:
    """Return the settings from the flags of sampling, size and concepts that the script has."""

    def flag(name: str, default: Any = None) -> Any:
        return getattr(options, name, default)

    def several(name: str) -> tuple[Any, ...] | None:
        return None if flag(name) is None else tuple(flag(name))

    return GenerationSettings(
        num_inference_steps=options.ddim_steps, guidance_scale=options.scale, sampler=options.sampler,
        eta=options.ddim_eta, height=flag("H"), width=flag("W"), bias=several("bias"),
        temperature=several("temperature"), global_locking=flag("global_locking", False),
        all_layers=flag("all_layers", False), prompt_weights=not flag("no_prompt_weights", False),
        original_size=several("original_size"), crop=several("crop_coords"), target_size=several("target_size"),
        timestep_spacing=options.timestep_spacing, guidance_rescale=options.guidance_rescale)


def model_settings(options: argparse.Namespace) -> ModelSettings:
    """Return the settings of the base model from the flags of `add_model_flags`."""
    return ModelSettings(options.config, options.ckpt, options.device, options.precision, options.vae,
                         options.text_encoder, tuple(options.lora))


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts given one by one and, after them, those of a text file.

    Raises:
        UserError: the file is missing, is not text or is empty, or there is no prompt at all.
    """
    lines = [] if file is None else [line.text for line in read_prompt_file(file, f"--from-file {file}")]
    if not prompts and not lines:
        raise UserError('no prompt; give --prompt "a photo of a dog" or --from-file FILE')
    return [*(prompt.strip() for prompt in prompts), *lines]
