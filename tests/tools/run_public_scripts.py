"""Run public scripts that import `ldm` on this package and on their own, and compare: a tool for developers.

    python tests/tools/run_public_scripts.py FOLDER [--only NAME ...] [--keep DIR] [--markdown] [--list]

FOLDER holds clones of public repositories, named OWNER--NAME or NAME; nothing is fetched. Each script runs unchanged
from its own file, with the same tiny random checkpoint and the same seed on both packages.
"""
from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from public_scripts.compare import Row, compare_run
from public_scripts.run import PublicRun, Workplace
from public_scripts.table import markdown_table, text_line

RUN_MODULES = ("public_scripts.sampling_runs", "public_scripts.training_runs")


def all_runs() -> tuple[PublicRun, ...]:
    """Return the runs of all modules."""
    return tuple(run for module in RUN_MODULES for run in importlib.import_module(module).RUNS)


def known_runs(place: Workplace, runs: Sequence[PublicRun]) -> list[PublicRun]:
    """Return the runs whose repository is there."""
    return [run for run in runs if place.repository(run.repository) is not None]


def compare_all(place: Workplace, runs: Sequence[PublicRun]) -> Iterator[Row]:
    """Compare runs one by one; print a line for each."""
    for run in runs:
        row = compare_run(run, place)
        print(text_line(row), flush=True)
        yield row


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("folder", type=Path, help="folder of public repositories")
    result.add_argument("--only", nargs="+", metavar="NAME", help="run these alone; a part of a name is enough")
    result.add_argument("--list", action="store_true", help="print the names of all runs, and stop")
    result.add_argument("--keep", type=Path, metavar="DIR",
                        help="keep all files here, and use checkpoints and outcomes of the originals found here")
    result.add_argument("--markdown", action="store_true", help="print the table as Markdown at the end")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare and print; return 0 if everything agrees, 1 if something does not, 2 if there is nothing to run."""
    options = parser().parse_args(arguments)
    runs = [run for run in all_runs() if not options.only or any(part in run.name for part in options.only)]
    if options.list:
        print(*(f"{run.name}  ({run.repository})" for run in runs), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Workplace(options.folder, options.keep or Path(temporary))
        found = known_runs(place, runs)
        if not found:
            print(f"{options.folder}: no repository of these runs is there; clone one, for example "
                  "CompVis/stable-diffusion as CompVis--stable-diffusion", file=sys.stderr)
            return 2
        rows = list(compare_all(place, found))
    if options.markdown:
        print(markdown_table(rows))
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
