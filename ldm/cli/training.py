"""The command line of main.py: the flags of the LDM family that apply here, and those of training a concept.

Imports no torch, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from ldm.cli.parser import Parser, add_part_flags, int_in_range
from ldm.common.paths import expand_home
from ldm.training.options import DEFAULT_SEED, SEED_LIMIT, TrainingOptions

OVERRIDE = re.compile(r"(model|data|lightning|inference)(\.[\w.]+)?=")
DESCRIPTION = """Train what a config describes. Anything of the form key=value after the flags
overrides that key of the YAML, for example: lightning.trainer.max_steps=100"""


def parse_training_options(arguments: Sequence[str] | None = None) -> TrainingOptions:
    """Return the options of a command line, by default that of this process.

    Raises:
        UserError: a flag is unknown or has a wrong value.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # An override may follow anywhere, also after a flag of several values.
    overrides = [text for text in given if OVERRIDE.match(text)]
    flags = [text for text in given if not OVERRIDE.match(text)]
    options, unknown = get_parser().parse_known_args(flags)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    return TrainingOptions(**values, overrides=(*unknown, *overrides))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of main.py, without the overrides."""
    parser = Parser(DESCRIPTION, prog="main.py", takes_overrides=True)
    _add_run_flags(parser)
    _add_concept_flags(parser)
    _add_trainer_flags(parser)
    _add_public_flags(parser)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-b", "--base", dest="configs", nargs="*", default=[], type=expand_home, metavar="base.yaml",
                        help="configs; later ones override earlier ones")
    parser.add_argument("-n", "--name", default="", help="name of the run's log folder, after the date")
    parser.add_argument("-f", "--postfix", default="", help="text after that name")
    parser.add_argument("-l", "--logdir", type=expand_home, default="logs",
                        help="folder of all log folders (default: logs)")
    parser.add_argument("-r", "--resume", type=expand_home, default="",
                        help="continue a run: its log folder or one of its checkpoints. Its own config is used")
    parser.add_argument("--resume_anyway", action="store_true", help="continue it even if something differs from that "
                        "run that decides what it learns: photos, words, seed, batch size, ...")
    parser.add_argument("-t", "--train", nargs="?", const=True, default=True, type=_boolean,
                        help="train (the default); '-t false' builds everything, reports, and stops")
    parser.add_argument("-s", "--seed", type=int_in_range(0, SEED_LIMIT),
                        help=f"seed of everything random (default: {DEFAULT_SEED})")
    parser.add_argument("--scale_lr", nargs="?", const=True, default=True, type=_boolean,
                        help="multiply base_learning_rate by devices x batch size x accumulation (default: true)")


def _add_concept_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_root", nargs="+", type=expand_home, metavar="FOLDER", help="folder of 1 to 20 photos "
                        "of the subject; several folders are several subjects, which one run learns")
    parser.add_argument("--init_word", dest="super_category", nargs="+", metavar="WORDS",
                        help='what kind of subject it is: its super-category, such as "teddy bear"; of several '
                        "subjects one for all, or one each")
    parser.add_argument("--init_embedding", nargs="+", type=expand_home, metavar="FILE",
                        help="embedding or concept file whose word the training starts from, in place of the "
                        "super-category's; of several subjects one for all, or one each")
    parser.add_argument("--placeholder", "--placeholder_string", nargs="+", metavar="WORD", help="its own word in "
                        'prompts, such as "<my-teddy>"; of several subjects one each (default: the names of their '
                        "folders)")
    parser.add_argument("--masks", nargs="+", type=expand_home, metavar="FOLDER", help="folder of masks (one image per "
                        "photo, of the same name, white where the subject is), or 'none'; by default the subject is "
                        "segmented automatically")
    parser.add_argument("--crop", choices=("subject", "center"), help="train on the square around the subject (the "
                        "default), or on the center of each photo")
    parser.add_argument("--actual_resume", dest="checkpoint", type=expand_home, metavar="FILE",
                        help="base model to start from: .ckpt, .safetensors or diffusers folder")
    add_part_flags(parser)


def _add_trainer_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accelerator", help="cpu, gpu or mps (default: the best there is)")
    parser.add_argument("--devices", help="how many, or which ones")
    parser.add_argument("--max_steps", type=int_in_range(0), help="training steps; 0, with an encoder: "
                        "only predict the concept")
    parser.add_argument("--precision", help="arithmetic, as Lightning names it: 32-true, bf16-mixed, 16-mixed")


def _add_public_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags that the main.py of latent-diffusion, Textual Inversion or DreamBooth has."""
    public = parser.add_argument_group("flags of the LDM family, for its configs")
    public.add_argument("--gpus", help='the GPUs: "0," is the first, "2" are two; the same as --accelerator and '
                        "--devices")
    public.add_argument("--reg_data_root", type=expand_home, metavar="FOLDER",
                        help="DreamBooth: images of the subject's class")
    public.add_argument("--class_word", metavar="WORD", help='DreamBooth: that class in captions, such as "dog"')
    public.add_argument("--embedding_manager_ckpt", type=expand_home, metavar="FILE",
                        help="Textual Inversion: vectors to start from")
    public.add_argument("--no-test", nargs="?", default=argparse.SUPPRESS, type=_boolean, action=Ignored,
                        help="ignored: evaluation/ does the testing")
    public.add_argument("--datadir_in_name", nargs="?", default=argparse.SUPPRESS, type=_boolean, action=Ignored,
                        help="ignored: log folders are named by date and --name")
    public.add_argument("-p", "--project", default=argparse.SUPPRESS, action=Ignored,
                        help="ignored: --logdir and --name name the log folder")


class Ignored(argparse.Action):
    """The action of a flag that is accepted and does nothing."""

    def __call__(self, *_: object) -> None:
        pass


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError("true or false")
