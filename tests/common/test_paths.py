"""Paths that users name, on every command line and in configs."""
from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ldm.cli.parser import Parser
from ldm.cli.training import get_parser
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT, check_file, check_folder, expand_home, resolve_path, user_path

COMMANDS = ["merge_embeddings.py", *(f"scripts/{name}.py" for name in (
    "txt2img", "img2img", "inpaint", "attention_maps", "benchmark", "compute_covariance")),
    *(f"scripts/mini/{name}.py" for name in ("export", "fetch_sprites", "make_example_concepts", "rebuild")),
    *(f"evaluation/{name}.py" for name in ("base_model", "clip_eval", "pareto", "reproduce"))]
PATH_METAVARS = ("FILE", "FOLDER", "base.yaml")
PATH_DESTS = ("clip", "segmenter", "logdir", "resume", "config", "ckpt", "checkpoint", "run", "outdir", "output")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the working directory is another one."""
    for folder in ("home", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_home_folder_is_expanded_at_the_start_only(home: Path) -> None:
    root = Path("~root").expanduser()
    for given, expected in {"~": home, "~/a b/c": home / "a b/c", "~root/x": root / "x", "a/~": "a/~", "a~b": "a~b",
                            "~no-such-user/x": "~no-such-user/x", "~$lock.png": "~$lock.png", "": "", "a/": "a/",
                            "$HOME/x": "$HOME/x", "file:///x": "file:///x", "stabilityai/sd": "stabilityai/sd",
                            "./a": "./a", Path("~/c"): home / "c"}.items():
        assert expand_home(given) == str(expected)
        assert user_path(given) == Path(expected)


def test_a_folder_that_is_called_tilde_can_be_named(home: Path) -> None:
    Path("~").mkdir()
    assert resolve_path(expand_home("./~")) == Path.cwd() / "~"
    assert user_path(user_path("./~/x")) == Path.cwd() / "~" / "x"


def test_all_checks_look_in_the_home_folder(home: Path) -> None:
    (home / "photos").mkdir()
    (home / "file").touch()
    assert resolve_path("~/photos") == home / "photos"
    check_folder("--outdir", Path("~/new/folder"))
    with pytest.raises(UserError, match="is not a folder"):
        check_folder("--outdir", Path("~/file/below"))
    with pytest.raises(UserError, match="is a folder"):
        check_file("--output", Path("~/photos"))
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["x" * 300, "猫" * 100, "/".join(["x" * 200] * 30)])
def test_names_that_no_disk_takes_are_refused_in_one_line(home: Path, name: str) -> None:
    for check in (expand_home, resolve_path, lambda path: check_folder("--outdir", Path(path))):
        with pytest.raises(UserError, match=r"^.{80}\.\.\.: longer than the name of a file may be; give a path$"):
            check(name)


def test_a_null_character_is_refused(home: Path) -> None:
    with pytest.raises(UserError, match="not the name of a file"):
        expand_home("a\0b")


class Captured(Exception):
    """Holds the parser of a command."""


def load_command(file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = PROJECT_ROOT / file
    spec = importlib.util.spec_from_file_location(f"command_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def parser_of(file: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Captured(parser)

    module = load_command(file, monkeypatch)
    entry: Callable[[], object] = getattr(module, "parse_arguments", None) or module.main
    monkeypatch.setattr(Parser, "parse_known_args", capture)
    with pytest.raises(Captured) as captured:
        entry()
    return captured.value.args[0]


def path_flags(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.metavar in PATH_METAVARS or action.dest in PATH_DESTS:
            yield action


@pytest.mark.parametrize("file", ["main.py", *COMMANDS])
def test_every_path_flag_expands_the_home_folder(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = get_parser() if file == "main.py" else parser_of(file, monkeypatch)
    flags = list(path_flags(parser))
    assert flags and not [action.option_strings for action in flags if action.type not in (expand_home, user_path)]
