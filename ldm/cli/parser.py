"""The argument parser and the number types that all command lines share.

Imports no torch, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldm.cli.other_tools import answer_for
from ldm.common.errors import UserError, show_tracebacks
from ldm.common.paths import expand_home

FLAG = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
LEAST_SIMILARITY = 0.7  # of an unknown flag and the one that is meant


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, accepts no abbreviated flags, and knows `--debug`.

    Unknown flags are refused before anything else, with the flag that is meant: that of a similar name, or that of this
    project for a flag of another tool.

    Args:
        description: what the command does.
        epilog: text at the end of the help.
        prog: the command's name; None: that of the script.
        takes_overrides: whether the command takes "key=value" overrides of a config.
    """

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None,
                 takes_overrides: bool = False) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.takes_overrides = takes_overrides
        self.add_argument("-d", "--debug", action=ShowTracebacks, help="print the full traceback of an error "
                          "(the same as PERFUSION_DEBUG=1)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse a command line.

        Raises:
            UserError: there is a flag that this command does not have, or a value is wrong.
        """
        given = list(sys.argv[1:] if args is None else args)
        check_text(given)
        flags = given[:given.index("--")] if "--" in given else given
        if "-d" in flags or "--debug" in flags:  # before anything is refused
            show_tracebacks()
        for text in flags:
            if FLAG.fullmatch(text) and not self._has_flag(text):
                raise UserError(self._about_unknown_flag(text.partition("=")[0]))
        return super().parse_known_args(given, namespace)

    def _has_flag(self, text: str) -> bool:
        """Return whether a text is one of the flags, with a value after it or not, such as `-n5` and `--name=x`."""
        if text.partition("=")[0] in self._option_string_actions:
            return True
        return not text.startswith("--") and text[:2] in self._option_string_actions

    def _about_unknown_flag(self, flag: str) -> str:
        """Return the error message for a flag that the command does not have."""
        by_name = {name.lstrip("-").replace("-", "_").lower(): name for name in self._option_string_actions}
        plain = flag.lstrip("-").replace("-", "_").lower()
        if plain in by_name:  # in another spelling, such as --init-word
            return f"{flag}: no such flag; it is {by_name[plain]}"
        settings = {name: action.dest for name, action in self._option_string_actions.items()}
        answer = answer_for(flag, settings, self.takes_overrides)
        if answer is not None:
            return f"{flag} {answer}; see --help"
        similar = difflib.get_close_matches(plain, by_name, 1, LEAST_SIMILARITY)
        starting = [name for name in by_name if len(plain) > 2 and name.startswith(plain)]
        is_abbreviation = len({settings[by_name[name]] for name in starting}) == 1
        meant = starting if is_abbreviation else similar
        return f"{flag}: no such flag" + (f"; do you mean {by_name[meant[0]]}?" if meant else "") + "; see --help"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def check_text(arguments: Sequence[str]) -> None:
    """Raise UserError if an argument is no text in UTF-8: files and images that name it could not be written."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if "\ufffd" not in shown and argument in sys.argv[1:]:
                _restart_in_utf8_mode()
            raise UserError(f"argument {ascii(shown)[:200]}: is not in UTF-8; rename the file, or type the text in a "
                            "terminal that uses UTF-8") from None


def _restart_in_utf8_mode() -> None:
    """Run this command again, in the same process, with Python's UTF-8 mode, unless it is on.

    Without it, a terminal set to ASCII (LC_ALL=C) can name no file outside of ASCII.
    """
    if not sys.flags.utf8_mode:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


class ShowTracebacks(argparse.Action):
    """The action of `--debug`. It leaves nothing in the namespace."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, *_: Any) -> None:
        show_tracebacks()


def add_part_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of parts of the base model that come from other files."""
    group.add_argument("--vae", type=expand_home, metavar="FILE", help="take the first stage (VAE) from this "
                       ".safetensors, .ckpt or diffusers folder instead")
    group.add_argument("--text_encoder", type=expand_home, metavar="FOLDER", help="take the text encoder's weights "
                       "from this folder (of transformers or diffusers) or file instead; for Stable Diffusion XL also "
                       "from two, separated by a comma")


def int_in_range(least: int = 0, below: int | None = None) -> Callable[[str], int]:
    """Return a flag's type: a whole number from `least` up, and less than `below` if that is given."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (below is not None and value >= below):
            most = "" if below is None else f" and less than {below}"
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more{most}")
        return value

    return read


def float_in_range(least: float = -math.inf, most: float = math.inf, above: float = -math.inf
                   ) -> Callable[[str], float]:
    """Return a flag's type: a finite number from `least` to `most`, and larger than `above`."""
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", least), ("above", above), ("at most", most))
              if math.isfinite(bound)]

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'a finite number'}")
        return value

    return read
