"""What a training run is told: the flags of the LDM family, and YAML files that they and key=value pairs override."""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.parser import Parser, whole
from ldm.common.annotations import fits
from ldm.common.errors import UserError
from ldm.util import get_obj_from_str, known_params

SECTIONS = {"": ("model", "data", "lightning"), "model": ("target", "params", "base_learning_rate"),
            "data": ("target", "params"), "lightning": ("trainer", "callbacks", "modelcheckpoint", "seed")}
NEEDED = "model, data and, if need be, lightning"
FREE_SECTIONS = ("lightning.trainer", "lightning.callbacks", "lightning.modelcheckpoint")
TRAINER_FLAGS = ("accelerator", "devices", "max_steps", "precision")
DEFAULT_SEED = 23
SEED_LIMIT = 2**32
OVERRIDE = re.compile(rf"({'|'.join(SECTIONS[''])})(\.[\w.]+)?=")
FLAG_PATHS = {  # flag: the keys of the config that it sets, those that are there
    "data_root": ("data.params.train.params.data_root", "data.params.validation.params.data_root"),
    "init_word": ("model.params.super_category",),
    "placeholder": ("model.params.placeholder",),
    "masks": ("data.params.train.params.mask_root",),
    "actual_resume": ("model.params.ckpt_path",),
}


class RunParser(Parser):
    """A parser that a key=value override may follow anywhere, also after a flag of several values."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
                         ) -> tuple[argparse.Namespace, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        options, unknown = super().parse_known_args([text for text in given if not OVERRIDE.match(text)], namespace)
        return options, unknown + [text for text in given if OVERRIDE.match(text)]


def get_parser() -> argparse.ArgumentParser:
    """The flags of the LDM family that mean something here, and those of teaching a concept."""
    parser = RunParser("Train what a config describes. Anything of the form key=value after the flags\noverrides that "
                       "key of the YAML, for example: lightning.trainer.max_steps=100", prog="main.py")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="base.yaml", help="configs, later ones win")
    parser.add_argument("-n", "--name", default="", help="name of the run's log folder, after the date")
    parser.add_argument("-f", "--postfix", default="", help="text after that name")
    parser.add_argument("-l", "--logdir", default="logs", help="folder of all log folders (default: logs)")
    parser.add_argument("-r", "--resume", default="", help="go on with a run: its log folder or one of its checkpoints")
    parser.add_argument("-t", "--train", nargs="?", const=True, default=True, type=_flag,
                        help="train (the default); '-t false' builds everything, reports, and stops")
    parser.add_argument("--no-test", nargs="?", const=True, default=True, type=_flag,
                        help="kept from the LDM family: testing is done by evaluation/")
    parser.add_argument("-s", "--seed", type=whole(0, SEED_LIMIT),
                        help=f"seed of everything random (default: {DEFAULT_SEED})")
    parser.add_argument("-d", "--debug", action="store_true", help="show full error traces")
    parser.add_argument("--scale_lr", nargs="?", const=True, default=True, type=_flag,
                        help="multiply base_learning_rate by devices x batch size x accumulation (default: true)")
    parser.add_argument("--data_root", nargs="+", metavar="FOLDER", help="folder of 1 to 20 photos of the thing to "
                        "learn; several folders are several things, learned at once")
    parser.add_argument("--init_word", nargs="+", metavar="WORDS", help='what kind of thing it is: its super-category, '
                        'e.g. "teddy bear"; of several things one for all, or one each')
    parser.add_argument("--placeholder", "--placeholder_string", nargs="+", metavar="WORD", help="its own word in "
                        'prompts, e.g. "<my-teddy>"; of several things one each (default: the names of the folders)')
    parser.add_argument("--masks", nargs="+", metavar="FOLDER", help="folder of masks (one picture per photo, same "
                        "name, white where the thing is), or 'none'; by default masks are made automatically")
    parser.add_argument("--actual_resume", help="base model to start from: .ckpt, .safetensors or diffusers folder")
    parser.add_argument("--accelerator", help="cpu, gpu or mps (default: the best there is)")
    parser.add_argument("--devices", help="how many, or which ones")
    parser.add_argument("--max_steps", type=whole(1), help="training steps")
    parser.add_argument("--precision", help="arithmetic, as Lightning names it: 32-true, bf16-mixed, 16-mixed")
    return parser


def _flag(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError("true or false")


def read_config(options: argparse.Namespace, overrides: Sequence[str]) -> DictConfig:
    """The merged config: YAML files in order, then flags, then key=value overrides.

    Raises:
        UserError: a file or an override cannot be read, or a section is not one that a run has.
    """
    if not options.base:
        raise UserError("no config: give one with --base, for example --base configs/perfusion.yaml")
    config = OmegaConf.create({"lightning": {"trainer": {}}})
    for path in options.base:
        if not Path(path).is_file():
            raise UserError(f"--base {path}: no such file")
        later = _parsed(path, lambda path=path: OmegaConf.load(path))
        config = _merged(path, _for_the_target_of(later, config), later)
    _check_sections(config)
    _apply_flags(config, options)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override}: neither a flag (see --help) nor a key=value override")
    given = " ".join(overrides)
    config = _merged(given, config, _parsed(given, lambda: OmegaConf.from_dotlist(list(overrides))))
    _parsed("config", lambda: OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    _check_sections(config)
    _check_values(config)
    return config


def _for_the_target_of(later: DictConfig, config: DictConfig) -> DictConfig:
    """`config` without those params of its model that `later`, which names another model, does not share.

    So one file brings photos, base model and schedule, and the next another method. Params that neither knows stay, to
    be refused when the model is built.
    """
    both = (config, later)
    if not all(isinstance(one.get("model"), DictConfig) and one.model.get("target") for one in both):
        return config
    ours, theirs = (known_params(get_obj_from_str(one.model.target)) for one in both)
    params = config.model.get("params") or {}
    for name in (ours - theirs) & set(params):
        del params[name]
    return config


def _check_values(config: DictConfig) -> None:
    seed, rate = config.lightning.seed, config.model.get("base_learning_rate")
    if not fits(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise UserError(f"config: lightning.seed must be a whole number from 0 to {SEED_LIMIT - 1}, not {seed!r}")
    if rate is not None and not (fits(rate, float) and rate > 0):
        raise UserError(f"config: model.base_learning_rate must be a number above 0, not {rate!r}")


def _check_sections(config: DictConfig) -> None:
    for place in FREE_SECTIONS:
        if not isinstance(OmegaConf.select(config, place, default=OmegaConf.create()), DictConfig):
            raise UserError(f"config: {place} must hold keys with values")
    for place, known in SECTIONS.items():
        section = OmegaConf.select(config, place) if place else config
        if not isinstance(section, DictConfig):
            raise UserError(f"config: there is no section {place} with keys in it; a run needs {NEEDED}")
        unknown = sorted(set(map(str, section)) - set(known))
        if unknown:
            raise UserError(f"config: unknown key {', '.join(unknown)} in {place or 'the top level'}; "
                            f"known: {', '.join(known)}")


def _name_several(config: DictConfig, options: argparse.Namespace) -> None:
    """Things that are learned at once go by the names of their folders where no words are given for them.

    Raises:
        UserError: the config teaches no concept, or nothing says what the things are.
    """
    folders = options.data_root or []
    if len(folders) < 2:
        return
    if OmegaConf.select(config, "model.params.placeholder") is None:
        raise UserError(f"--data_root: {len(folders)} folders, but this config does not teach concepts; give it one")
    if options.init_word is None:
        raise UserError(f"--data_root: {len(folders)} things to learn; say what they are, in order, for example "
                        '--init_word "teddy bear" teapot, or one word for all')
    if options.placeholder is None:
        options.placeholder = [f"<{'-'.join(Path(folder).resolve().name.strip('<>').split())}>" for folder in folders]


def _apply_flags(config: DictConfig, options: argparse.Namespace) -> None:
    _name_several(config, options)
    for flag, paths in FLAG_PATHS.items():
        value = getattr(options, flag)
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if flag == "masks" and value == "none":
            _set_flag(config, flag, ("model.params.segmenter", *paths), None)
        elif value is not None:
            _set_flag(config, flag, paths, value)
    for flag in TRAINER_FLAGS:
        if (value := getattr(options, flag)) is not None:
            config.lightning.trainer[flag] = value
    seed = config.lightning.get("seed", DEFAULT_SEED)
    config.lightning.seed = seed if options.seed is None else options.seed


def _parsed(name: str, read: Callable[[], DictConfig | ListConfig]) -> DictConfig:
    try:
        config = read()
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not readable as a config ({reason})") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{name}: a config has keys with values at its top level")
    return config


def _merged(name: str, earlier: DictConfig, later: DictConfig) -> DictConfig:
    try:
        return OmegaConf.merge(earlier, later)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # such as a list where there were keys
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: does not fit the config that it is to change ({reason})") from None


def _set_flag(config: DictConfig, flag: str, paths: Sequence[str], value: str | list[str] | None) -> None:
    present = []
    for path in paths:
        parent = OmegaConf.select(config, path.rpartition(".")[0])
        if isinstance(parent, DictConfig) and path.rpartition(".")[2] in parent:
            present.append(path)
    if not present:
        raise UserError(f"--{flag}: this config has no {' or '.join(paths)} to set")
    for path in present:
        OmegaConf.update(config, path, value)
