"""From the benchmarks' JSON to a table in the terminal, the README's tables, and a plot for each machine.

    python benchmarks/report.py [FOLDER]                   prints our ratios, one line for each work
    python benchmarks/report.py [FOLDER] --readme [FILE]   writes the tables into FILE (README.md) between its markers
                                                           and the plots <device>.svg, and <device>-growth.svg of
                                                           training steps, into FOLDER (benchmarks/results)

Works that we lose are in all of them. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

if __package__:
    from .plots import bars, growth
    from .words import Result, Work, about_line, digits, duration, rate, short, step_figures, times, title
else:  # run as a script, which is in no package
    from plots import bars, growth
    from words import Result, Work, about_line, digits, duration, rate, short, step_figures, times, title

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
GROWTH = "step_growth"
AXES = {"clips": "clips", "tokens": "tokens of a clip", "model": "parameters"}  # what grows -> below its panel
ORDER = (
    *("step", GROWTH, "tubelet", "gather", "predictor_tokens", "loss", "attention", "norm", "mlp", "block", "ema"),
    *("gradient_norm", "optimizer", "overhead"),
)

HEADER = (
    "| | work | ours | reaches | best peer | ratio | other peers | ours by name |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class File:
    """One file of results."""

    op: str
    slug: str  # of the machine
    about: dict[str, Any]
    ceilings: dict[str, Any]
    works: list[Work]


def load(folder: Path, kind: str | None = None) -> dict[str, list[File]]:
    """The files of `folder` for each machine (its slug), GPUs first, then those with a whole step.

    kind: cpu or cuda, for these machines alone.
    """
    machines: dict[str, list[File]] = {}
    for path in folder.glob("*-*.json"):
        content = json.loads(path.read_text())
        op, slug = path.stem.split("-", 1)
        if kind in (None, content["machine"]["kind"]):
            file = File(op, slug, content["machine"], content["ceilings"], content["works"])
            machines.setdefault(slug, []).append(file)
    for files in machines.values():
        files.sort(key=lambda file: (ORDER.index(file.op) if file.op in ORDER else len(ORDER), file.op))
    return dict(
        sorted(machines.items(), key=lambda item: (item[1][0].about["kind"] == "cpu", not _steps(item[1]), item[0]))
    )


def _steps(files: Sequence[File]) -> list[Work]:
    """The whole training steps."""
    return [work for file in files if file.op == "step" for work in file.works if not work["about"].get("part")]


def ours(work: Work) -> list[Result]:
    """Our results for a work: auto, then the named backends that do not serve auto already, fastest first."""
    rows = [row for row in work["results"] if row["backend"] is not None]
    auto = [row for row in rows if row["backend"] == "auto"]
    served = {row["served_by"] for row in auto if row["served_by"]}
    named = [row for row in rows if row["backend"] != "auto" and row["backend"] not in served]
    return auto + sorted(named, key=lambda row: row["median"])


def best_peer(work: Work) -> Result | None:
    """The fastest result that is not ours."""
    return min((row for row in work["results"] if row["backend"] is None), key=lambda row: row["median"], default=None)


def also(work: Work) -> float | None:
    """Our ratio to the peer that the work wants named besides the best, where it is another."""
    peer, rows, name = best_peer(work), ours(work), work.get("also")
    if not rows or peer is None or name in (None, peer["contender"]):
        return None
    return rows[0]["peers"].get(name, {}).get("ratio")


# ------------------------------------------------------------------------------------------------------------- terminal


def lines(about: dict[str, Any], works: Sequence[Work]) -> Iterator[str]:
    """A short table: each work with our ratios, the rate of our default, and the best peer."""
    yield about_line(about)
    for work in works:
        peer, rows = best_peer(work), ours(work)
        ratios = "  ".join(f"{row['backend']} {times(row['ratio'])}" for row in rows)
        reached = (
            " ".join([duration(rows[0]["median"]), *step_figures(rows[0], work), rate(rows[0], work)]) if rows else ""
        )
        figure = f"{ratios} | {reached}" if rows else "not timed"
        words = " ".join([peer["contender"], duration(peer["median"]), *step_figures(peer, work)]) if peer else ""
        beside = f" | {words}" if rows and peer else ""
        beside += f" | {work['also']} {times(also(work))}" if also(work) else ""
        yield f"{work['op']}: {title(work)}: {figure}{beside}"
        for word, sentences in (("FAILED", work["failed"]), ("left out", work["left_out"])):
            for name, sentence in sentences.items():
                yield f"    {word} {name}: {sentence.splitlines()[0][:200]}"


# --------------------------------------------------------------------------------------------------------------- README


def markdown(machines: dict[str, list[File]], plots: dict[str, str], growths: dict[str, str]) -> str:
    """For each machine what it is, its plots (slug -> address), its training steps, and the table of all works."""
    blocks = []
    for slug, files in machines.items():
        device = files[0].about["device"]
        runs = dict.fromkeys(f"{about_line(file.about, short=True)}; {_ceilings(file.ceilings)}" for file in files)
        rows = [
            f"**{device}** ({'). ('.join(runs)}).",
            "",
            f"![{device}: time of the best peer over ours]({plots[slug]})",
            "",
            *([f"![{device}: time of a training step]({growths[slug]})", ""] if slug in growths else []),
            *([*HEADER, *map(_markdown_row, _steps(files)), ""] if _steps(files) else []),
            f"<details><summary>{device}: all works and all peers</summary>",
            "",
            *HEADER,
            *(_markdown_row(work) for file in files if file.op != GROWTH for work in file.works),
            "",
            "</details>",
        ]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def _ceilings(ceilings: dict[str, Any]) -> str:
    gemm = " and ".join(f"{digits(value)} in {short(name)}" for name, value in ceilings["gemm_tflop_s"].items())
    return f"a large copy reaches {ceilings['copy_gb_s']:.0f} GB/s, a large matrix product {gemm} TFLOP/s"


def _markdown_row(work: Work) -> str:
    rows, peer = ours(work), best_peer(work)
    if not rows:
        return f"| {work['op']} | {title(work)} | failed: {', '.join(work['failed'])} | | | | | |"
    default = rows[0]
    beside = sorted(default["peers"].items(), key=lambda item: item[1]["ratio"])
    named_already = {peer and peer["contender"], work.get("also")}
    others = [f"{name} {times(entry['ratio'])}" for name, entry in beside if name not in named_already]
    others += [f"{name}: {'failed' if name in work['failed'] else 'left out'}" for name in _missing(work, ours=False)]
    named = [f"{row['backend']} {times(row['ratio'])}" for row in rows[1:]]
    named += [f"{name}: {'failed' if name in work['failed'] else 'left out'}" for name in _missing(work, ours=True)]
    ratio = _bold(default["ratio"]) if peer else ""
    if also(work):
        ratio += f"; {work['also']} {_bold(also(work))}"
    cells = (
        work["op"],
        title(work),
        ", ".join([f"{duration(default['median'])} ({default['served_by'] or 'auto'})", *step_figures(default, work)]),
        rate(default, work),
        ", ".join([peer["contender"], duration(peer["median"]), *step_figures(peer, work)]) if peer else "",
        ratio,
        ", ".join(others),
        ", ".join(named),
    )
    return f"| {' | '.join(cells)} |"


def _bold(ratio: float) -> str:
    return f"**{times(ratio)}**" if ratio >= 1 else times(ratio)


def _missing(work: Work, ours: bool) -> list[str]:
    return [name for name in (*work["failed"], *work["left_out"]) if name.startswith("vjepa (") == ours]


def insert(text: str, tables: str) -> str:
    """`text` with what is between its markers replaced."""
    found = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(found.findall(text)) != 1:
        raise ValueError(f"the file must have one {BEGIN} with one {END} after it")
    return found.sub(lambda match: f"{BEGIN}\n{tables}\n{END}", text)


# ---------------------------------------------------------------------------------------------------------------- plots


def bar_plot(files: Sequence[File]) -> str:
    """A bar for each work, and each backend of ours."""
    ratios = [
        (f"{work['op']}: {title(work)}" + ("" if row["backend"] == "auto" else f" [{row['backend']}]"), row["ratio"])
        for file in files
        if file.op != GROWTH
        for work in file.works
        for row in ours(work)
        if row["ratio"]
    ]
    return bars(files[0].about["device"], ratios)


def growth_plot(files: Sequence[File]) -> str | None:
    """How the time of a step grows, or None if that was not measured."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for work in (work for file in files if file.op == GROWTH for work in file.works):
        axis = work["about"]["axis"]
        curves = panels.setdefault(AXES[axis], {})
        for row in work["results"]:
            curves.setdefault(row["contender"], []).append((work["about"]["at"][axis], row["median"]))
    return growth(files[0].about["device"], panels) if any(panels.values()) else None


# -------------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description="The benchmarks' JSON as tables and plots.")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="where the JSON is (%(default)s)")
    parser.add_argument("--readme", nargs="?", type=Path, const=ROOT / "README.md", help="the file with the markers")
    parser.add_argument("--kind", choices=("cpu", "cuda"), help="machines of this kind alone")
    arguments = parser.parse_args()
    machines = load(arguments.folder, arguments.kind)
    if not machines:
        parser.error(f"{arguments.folder} holds no results of {arguments.kind or 'any machine'}")
    if arguments.readme is None:
        for files in machines.values():
            for about, group in groupby(files, key=lambda file: file.about):
                print("\n".join(lines(about, [work for file in group for work in file.works])))
        return
    plots, growths = {}, {}
    for slug, files in machines.items():
        for kind, name, picture in ((plots, slug, bar_plot(files)), (growths, f"{slug}-growth", growth_plot(files))):
            if picture is not None:
                path = arguments.folder / f"{name}.svg"
                path.write_text(picture)
                kind[slug] = os.path.relpath(path, arguments.readme.parent).replace(os.sep, "/")
    arguments.readme.write_text(insert(arguments.readme.read_text(), markdown(machines, plots, growths)))


if __name__ == "__main__":
    main()
