"""`vjepa bench`: runs the benchmarks of the source checkout on this machine and prints their table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vjepa.cli import FAILED, OK, CommandError, UsageError

SUITE = "benchmarks"
BESIDE = ("harness.py", "report.py")  # by which the folder of the suite is known
NEEDED = ("pytest", "pytest_benchmark")
DATA = "data"
DESCRIPTION = (
    "Run the benchmarks of the source checkout on this machine, each beside its best peers, and print the table. "
    "For example: vjepa bench step ema --out results. `vjepa bench data PATH` measures how fast clips are decoded."
)


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; returns the exit code: 1 if a benchmark failed."""
    if argv and argv[0] == DATA:
        return importlib.import_module("vjepa.cli_bench_data").main(argv[1:])
    arguments = build_parser().parse_args(argv)
    folder = suite()
    files = chosen(folder, arguments.names)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise CommandError(
            f"the benchmarks need {' and '.join(missing)}, which is not installed; get it with: pip install 'vjepa[bench]'"
        )
    root = folder.parent
    out = arguments.out.resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    command += ["-p", "no:cacheprovider", "-p", "no:timeout", "--override-ini", "addopts=--import-mode=importlib"]
    command += ["--benchmark-only", "--results", str(out), *map(str, files)]
    if arguments.reference_repo is not None:
        command += ["--reference-repo", str(arguments.reference_repo.resolve())]
    done = subprocess.run(command, cwd=root, check=False)
    print(f"results are in {out}")
    return OK if done.returncode == 0 else FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vjepa bench", description=DESCRIPTION)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to run, such as step or ema (default: all)"
    )
    help_text = "folder for the results, one JSON file for each benchmark (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), metavar="DIR", help=help_text)
    help_text = "a checkout of the released V-JEPA code, which then takes part in the benchmark of a training step"
    parser.add_argument("--reference-repo", type=Path, metavar="PATH", help=help_text)
    return parser


def suite() -> Path:
    """The folder of the benchmarks: beside the installed package (an editable install), or in the current directory.

    Raises:
        CommandError: There is none.
    """
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    for place in places:
        if all((place / SUITE / name).is_file() for name in BESIDE):
            return place / SUITE
    raise CommandError(
        f"the folder {SUITE!r} of the source checkout is needed; install that with 'pip install -e .', or run this in it"
    )


def chosen(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the named benchmarks, or the whole folder.

    Raises:
        UsageError: There is no such benchmark.
    """
    known = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no benchmark {name!r}; expected {DATA}, {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or [folder]
