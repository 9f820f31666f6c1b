"""Command-line flags that the scripts which draw pictures share, checked as they are read.

Nothing here imports torch, so `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.parser import number, whole
from ldm.common.errors import UserError
from ldm.common.paths import check_folder
from ldm.models.diffusion.samplers import SAMPLERS

DEFAULT_CONFIG = "configs/perfusion.yaml"
SEED_LIMIT = 2**63
AUTO = "auto"  # a bias that `ldm.inference.auto_bias` is to find
TOLD_APART = "of one concept, or one for each in the order in which they are listed"
FOUND = "; auto finds a balance by a small sweep of its own and says which"


def add_drawing_options(parser: argparse.ArgumentParser, outdir: str) -> None:
    """All flags that every script which draws has."""
    add_prompt_options(parser)
    add_concept_options(parser, automatic=True)
    add_sampling_options(parser)
    add_amount_options(parser)
    add_model_options(parser, outdir)


def add_original_options(parser: argparse.ArgumentParser, strength: float, meaning: str) -> argparse._ArgumentGroup:
    """The flags of a picture that others are made from; `meaning` says what `strength`, its usual value given, does."""
    group = parser.add_argument_group("what to start from")
    group.add_argument("--init-img", "--init_img", dest="init_img", required=True, metavar="FILE",
                       help="a picture of any size; its middle is used, in the proportions of --W and --H")
    group.add_argument("--strength", type=number(above=0, most=1), default=strength, metavar="NUMBER",
                       help=f"{meaning} (default: %(default)s)")
    return group


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT",
                       help="one prompt or several, each in quotes")
    group.add_argument("--from-file", "--from_file", dest="from_file", metavar="FILE",
                       help="text file with one prompt per line; added to those of --prompt")
    group.add_argument("--negative_prompt", nargs="+", action="extend", default=[], metavar="TEXT",
                       help="what guidance leads away from, in place of the empty prompt; one for all prompts, or one "
                       "for each")


def number_or_auto(text: str) -> float | str:
    """A flag's type: a finite number, or `AUTO`."""
    return text if text == AUTO else number()(text)


def add_concept_options(parser: argparse.ArgumentParser, automatic: bool = False) -> None:
    """The flags of concepts; those of --bias auto where that is `automatic`."""
    group = parser.add_argument_group("learned concepts")
    group.add_argument("--concept", "--embedding_path", dest="concept", nargs="+", action="extend", default=[],
                       metavar="FILE", help="concept files, each of one concept or merged of several; without this "
                       "flag the base model draws alone")
    group.add_argument("--bias", nargs="+", type=number_or_auto if automatic else number(), metavar="NUMBER",
                       help=f"beta: higher follows the prompt more and the concept less; {TOLD_APART}. 0.6 to 0.75 is "
                       f"usual, with --global_locking 0.4 to 0.6{FOUND if automatic else ''} (default: that of "
                       "training)")
    group.add_argument("--temperature", nargs="+", type=number(above=0), metavar="NUMBER",
                       help=f"tau: how softly the concept sets in; {TOLD_APART}. 0.15 is usual (default: that of "
                       "training)")
    group.add_argument("--global_locking", action="store_true",
                       help="lock the keys of the whole prompt, not only the concept's, to those of its super-category")
    group.add_argument("--all_layers", action="store_true",
                       help="draw with what all layers have learned, of concepts that use some: nearer to the photos, "
                       "for a thing alone")
    if automatic:
        _add_automatic_bias_options(group)


def draw_as_trained(parser: argparse.ArgumentParser) -> None:
    """What a script has in place of `add_concept_options` and negative prompts that leaves concepts as they are."""
    parser.set_defaults(bias=None, temperature=None, global_locking=False, all_layers=False, negative_prompt=[])


def _add_automatic_bias_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--clip", metavar="NAME", help="what --bias auto measures by: a folder with a CLIP of "
                       "transformers or open_clip, or ARCHITECTURE/WEIGHTS of open_clip such as ViT-B-32/openai "
                       "(default: the folder evaluation_clip beside the base model)")
    group.add_argument("--photos", metavar="FOLDER", help="the concept's photos, for --bias auto to compare with "
                       "(default: pictures of it that are drawn with the lowest bias)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to draw it")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--sampler", choices=tuple(SAMPLERS), default="ddim",
                       help="dpm is DPM-Solver++(2M), good from 20 steps on; euler_a, ancestral Euler, adds noise in "
                       "each step; heun takes twice the time per step (default: ddim)")
    which.add_argument("--plms", action="store_const", dest="sampler", const="plms", default=argparse.SUPPRESS,
                       help="short for --sampler plms")
    group.add_argument("--ddim_steps", "--steps", dest="ddim_steps", type=whole(1), default=50, metavar="N",
                       help="sampling steps, of any sampler (default: 50)")
    group.add_argument("--ddim_eta", type=number(0, 1), metavar="NUMBER",
                       help="noise added in each step, from 0, none, to 1; for ddim (default: 0) and euler_a "
                       "(default: 1)")
    group.add_argument("--scale", type=number(0), default=6.0, metavar="NUMBER",
                       help="guidance: 1 is none, higher follows the prompt more closely (default: 6)")
    group.add_argument("--seed", type=whole(0, SEED_LIMIT), default=1, metavar="N",
                       help="of each prompt's first picture; the next ones count up from it (default: 1)")


def add_amount_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how many, how large")
    group.add_argument("--n_samples", type=whole(1), default=4, metavar="N", help="pictures per prompt (default: 4)")
    group.add_argument("--n_iter", type=whole(1), default=1, metavar="N",
                       help="so many times as many, with further seeds (default: 1)")
    group.add_argument("--batch_size", type=whole(1), metavar="N",
                       help="pictures drawn at a time; fewer take less memory (default: as --n_samples)")
    group.add_argument("--H", type=whole(1), metavar="PIXELS", help="height (default: the model's)")
    group.add_argument("--W", type=whole(1), metavar="PIXELS", help="width (default: the model's)")


def add_model_options(parser: argparse.ArgumentParser, outdir: str) -> None:
    group = parser.add_argument_group("base model, machine, output")
    group.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE",
                       help="the base model's config (default: %(default)s)")
    group.add_argument("--ckpt", metavar="FILE",
                       help=".safetensors, .ckpt or diffusers folder of the base model (default: the config's)")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ... (default: the fastest there is)")
    group.add_argument("--precision", choices=("full", "autocast"),
                       help="autocast: sample in 16 bits, full: in 32 (default: autocast on cuda, full elsewhere)")
    group.add_argument("--outdir", default=outdir, metavar="FOLDER", help="where to write (default: %(default)s)")


def check_together(options: argparse.Namespace) -> None:
    """Raises a UserError where flags contradict each other, or files and folders they name cannot be used."""
    given = {"--bias": options.bias, "--temperature": options.temperature, "--global_locking": options.global_locking,
             "--all_layers": options.all_layers}
    idle = [flag for flag, value in given.items() if value]
    if idle and not options.concept:
        raise UserError(f"{idle[0]} acts on learned concepts; name a file of one with --concept")
    if options.negative_prompt and options.scale == 1:
        raise UserError("--negative_prompt acts through guidance, and --scale 1 is none; raise --scale")
    if options.ckpt is not None and not Path(options.ckpt).exists():
        raise UserError(f"--ckpt {options.ckpt}: no such file or folder")
    if not Path(options.config).is_file():
        raise UserError(f"--config {options.config}: no such file; name one, from the project's own folder those in "
                        "configs/")
    check_folder("--outdir", Path(options.outdir))


def check_drawing(options: argparse.Namespace) -> None:
    """`check_together` of the flags of `add_drawing_options`."""
    check_together(options)
    found = (options.bias or []).count(AUTO)
    for flag, value in (("--clip", options.clip), ("--photos", options.photos)):
        if value is not None and not found:
            raise UserError(f"{flag} goes with --bias {AUTO}; add that, or leave the flag out")
    if options.photos is not None and not Path(options.photos).is_dir():
        raise UserError(f"--photos {options.photos}: no such folder; give the one that holds the concept's photos")


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts given one by one and, after them, those of a text file; at least one.

    Raises:
        UserError: the file is missing, no text or empty, or there is no prompt at all.
    """
    lines = [] if file is None else _lines(Path(file))
    if not prompts and not lines:
        raise UserError('nothing to draw; give --prompt "a photo of a dog" or --from-file FILE')
    return [*(prompt.strip() for prompt in prompts), *lines]


def negative_for_each(negative_prompts: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The negative prompt of each prompt: the only one, its own, or where there are none the empty one.

    Raises:
        UserError: there are several, but not one for each prompt.
    """
    given = [prompt.strip() for prompt in negative_prompts] or [""]
    if len(given) not in (1, len(prompts)):
        raise UserError(f"--negative_prompt: {len(given)} of them for {len(prompts)} prompts; give one for all or one "
                        "for each")
    return given * len(prompts) if len(given) == 1 else given


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--from-file {path}: no such file; give a text file with one prompt per line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError):
        raise UserError(f"--from-file {path}: not a text file in UTF-8; save it as one") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--from-file {path}: no prompts in it; write one per line")
    return lines
