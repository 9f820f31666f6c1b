"""The commands in the documents exist, and so do their flags and the links between the documents."""
from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
             ROOT / "evaluation" / "README.md", ROOT / "configs" / "baselines" / "README.md",
             ROOT / "models" / "mini" / "README.md"]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return each `python SCRIPT ...` of the shell blocks: the script, and its long flags."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for script, arguments in re.findall(r"python ([\w/]+\.py)([^#&]*)", line):
                found.append((script, re.findall(r"(?<!\S)(--[\w-]+)", arguments)))
    return found


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_and_their_flags_exist(document: Path) -> None:
    for script, flags in commands(document.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
        missing = [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", help_of(script))]
        assert not missing, f"{script}: {missing}"


def test_the_readme_has_commands() -> None:
    scripts = {script for script, _ in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"main.py", "scripts/txt2img.py", "merge_embeddings.py"} <= scripts


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document if not path else (document.parent / path).resolve()
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800
