"""The table of samplers, which command lines, tests and docs read."""
from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli.generation import add_sampling_flags
from ldm.cli.parser import Parser
from ldm.common.errors import UserError
from ldm.sampling.ddim import DDIM
from ldm.sampling.samplers import SAMPLERS, SamplerEntry, sampler_class

ROOT = Path(__file__).resolve().parents[2]


def test_one_line_in_the_table_adds_a_sampler(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "copy", SamplerEntry("ddim.DDIM", "a copy of DDIM"))
    assert sampler_class("copy") is DDIM
    parser = Parser("")
    add_sampling_flags(parser)
    assert parser.parse_args(["--sampler", "copy"]).sampler == "copy"
    assert "copy: a copy of DDIM" in " ".join(parser.format_help().split())


def test_the_docs_name_every_sampler():
    docs = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in docs for name in SAMPLERS)


def test_unknown_samplers_are_refused():
    with pytest.raises(UserError, match="sampler 'ddpm' is unknown; choose one of ddim, plms"):
        sampler_class("ddpm")
