"""From the benchmarks' JSON to a table in the terminal, the README's tables, and a plot for each machine.

    python benchmarks/report.py [FOLDER]                   prints our ratios, one line for each work
    python benchmarks/report.py [FOLDER] --readme [FILE]   writes the tables into FILE (README.md) between its markers
                                                           and the plots <device>.svg into FOLDER (benchmarks/results)

Works that we lose are in all of them. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = (
    *("tubelet", "gather", "predictor_tokens", "loss", "attention", "norm", "mlp", "block", "ema"),
    *("gradient_norm", "optimizer", "overhead"),
)

Work = dict[str, Any]  # one entry of "works" in a file, see Outcome in harness.py
Result = dict[str, Any]


@dataclass(frozen=True)
class File:
    """One file of results."""

    op: str
    slug: str  # of the machine
    about: dict[str, Any]
    ceilings: dict[str, Any]
    works: list[Work]


def load(folder: Path, kind: str | None = None) -> dict[str, list[File]]:
    """The files of `folder` for each machine (its slug), GPUs first; `kind` cpu or cuda: of these machines alone."""
    machines: dict[str, list[File]] = {}
    for path in folder.glob("*-*.json"):
        content = json.loads(path.read_text())
        op, slug = path.stem.split("-", 1)
        if kind in (None, content["machine"]["kind"]):
            file = File(op, slug, content["machine"], content["ceilings"], content["works"])
            machines.setdefault(slug, []).append(file)
    for files in machines.values():
        files.sort(key=lambda file: (ORDER.index(file.op) if file.op in ORDER else len(ORDER), file.op))
    return dict(sorted(machines.items(), key=lambda item: (item[1][0].about["kind"] == "cpu", item[0])))


def ours(work: Work) -> list[Result]:
    """Our results for a work: auto, then the named backends that do not serve auto already, fastest first."""
    rows = [row for row in work["results"] if row["backend"] is not None]
    auto = [row for row in rows if row["backend"] == "auto"]
    served = {row["served_by"] for row in auto}
    named = [row for row in rows if row["backend"] != "auto" and row["backend"] not in served]
    return auto + sorted(named, key=lambda row: row["median"])


def best_peer(work: Work) -> Result | None:
    """The fastest result that is not ours."""
    return min((row for row in work["results"] if row["backend"] is None), key=lambda row: row["median"], default=None)


def also(work: Work) -> float | None:
    """Our ratio to the peer that the work wants named besides the best, where it is another."""
    peer, rows, name = best_peer(work), ours(work), work.get("also")
    if not rows or peer is None or name == peer["contender"]:
        return None
    return rows[0]["peers"].get(name, {}).get("ratio")


# ---------------------------------------------------------------------------------------------------------------- words


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            value = seconds * scale
            break
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def times(ratio: float | None) -> str:
    """How much faster: 1.23x."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def rate(row: Result) -> str:
    """The figure that is nearer to its ceiling, and its share of it."""
    copy, update, gemm, exp = (row.get(f"share_of_{ceiling}") or 0.0 for ceiling in ("copy", "update", "gemm", "exp"))
    if update > gemm:
        return f"{_digits(row['gb_s'])} GB/s ({update:.0%} of an update)"
    if not copy and not gemm:
        return ""
    if exp > max(copy, gemm):
        return f"{_digits(row['tflop_s'])} TFLOP/s ({exp:.0%} of the exp units)"
    figure = f"{_digits(row['gb_s'])} GB/s" if copy >= gemm else f"{_digits(row['tflop_s'])} TFLOP/s"
    return f"{figure} ({max(copy, gemm):.0%})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def title(work: Work) -> str:
    """What was done to what, in which dtype and packing."""
    return ", ".join([work["name"], _short(work["dtype"])] + ([work["packing"]] if work["packing"] else []))


def _short(dtype: str) -> str:
    return dtype.replace("bfloat16", "bf16").replace("float32", "fp32")


def about_line(about: dict[str, Any], short: bool = False) -> str:
    """The device (not if `short`) and the versions in one line."""
    commit = about["commit"] and about["commit"][:10] + "+" * about["commit"].endswith("+")
    named = ("driver", "torch", "triton", "cuda", "python")
    words = [f"{name} {about[name]}" for name in named if about[name]] + ([f"commit {commit}"] if commit else [])
    return ", ".join(([] if short else [about["device"]]) + words + [about["date"]])


# ------------------------------------------------------------------------------------------------------------- terminal


def lines(about: dict[str, Any], works: Sequence[Work]) -> Iterator[str]:
    """A short table: each work with our ratios, the rate of our default, and the best peer."""
    yield about_line(about)
    for work in works:
        peer, rows = best_peer(work), ours(work)
        ratios = "  ".join(f"{row['backend']} {times(row['ratio'])}" for row in rows)
        figure = f"{ratios} | {duration(rows[0]['median'])} {rate(rows[0])}" if rows else "not timed"
        beside = f" | {peer['contender']} {duration(peer['median'])}" if rows and peer else ""
        beside += f" | {work['also']} {times(also(work))}" if also(work) else ""
        yield f"{work['op']}: {title(work)}: {figure}{beside}"
        for word, sentences in (("FAILED", work["failed"]), ("left out", work["left_out"])):
            for name, sentence in sentences.items():
                yield f"    {word} {name}: {sentence.splitlines()[0][:200]}"


# --------------------------------------------------------------------------------------------------------------- README


def markdown(machines: dict[str, list[File]], plots: dict[str, str]) -> str:
    """For each machine what it is, its plot (slug -> address) and its table."""
    blocks = []
    for slug, files in machines.items():
        device = files[0].about["device"]
        runs = dict.fromkeys(f"{about_line(file.about, short=True)}; {_ceilings(file.ceilings)}" for file in files)
        rows = [
            f"**{device}** ({'). ('.join(runs)}).",
            "",
            f"![{device}: time of the best peer over ours]({plots[slug]})",
            "",
            f"<details><summary>{device}: all works and all peers</summary>",
            "",
            "| | work | ours | reaches | best peer | ratio | other peers | ours by name |",
            "|---|---|---|---|---|---|---|---|",
            *(_markdown_row(work) for file in files for work in file.works),
            "",
            "</details>",
        ]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def _ceilings(ceilings: dict[str, Any]) -> str:
    gemm = " and ".join(f"{_digits(value)} in {_short(name)}" for name, value in ceilings["gemm_tflop_s"].items())
    return f"a large copy reaches {ceilings['copy_gb_s']:.0f} GB/s, a large matrix product {gemm} TFLOP/s"


def _markdown_row(work: Work) -> str:
    rows, peer = ours(work), best_peer(work)
    if not rows or peer is None:
        return f"| {work['op']} | {title(work)} | failed: {', '.join(work['failed'])} | | | | | |"
    default = rows[0]
    beside = sorted(default["peers"].items(), key=lambda item: item[1]["ratio"])
    named_already = {peer["contender"], work.get("also")}
    others = [f"{name} {times(entry['ratio'])}" for name, entry in beside if name not in named_already]
    others += [f"{name}: {'failed' if name in work['failed'] else 'left out'}" for name in _missing(work, ours=False)]
    named = [f"{row['backend']} {times(row['ratio'])}" for row in rows[1:]]
    named += [f"{name}: {'failed' if name in work['failed'] else 'left out'}" for name in _missing(work, ours=True)]
    ratio = _bold(default["ratio"])
    if also(work):
        ratio += f"; {work['also']} {_bold(also(work))}"
    cells = (
        work["op"],
        title(work),
        f"{duration(default['median'])} ({default['served_by']})",
        rate(default),
        f"{peer['contender']}, {duration(peer['median'])}",
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


# ----------------------------------------------------------------------------------------------------------------- plot

BAR, GAP, LABELS, BARS, TOP, MARGIN = 15, 5, 590, 340, 60, 60  # pixels
SHORTEST, LONGEST = 0.1, 100.0  # ratios beyond are drawn as these, with their own number
WON, LOST, INK, GRID = "#15803d", "#c2410c", "#3f4752", "#d9dde3"


def plot(files: Sequence[File]) -> str:
    """A bar for each work, and each backend of ours: times as fast as the best peer, on a logarithmic scale around 1."""
    bars = [
        (f"{work['op']}: {title(work)}" + ("" if row["backend"] == "auto" else f" [{row['backend']}]"), row["ratio"])
        for file in files
        for work in file.works
        for row in ours(work)
        if row["ratio"]
    ]
    drawn = [min(max(ratio, SHORTEST), LONGEST) for _, ratio in bars]
    low, high = math.log(min([0.5, *drawn])), math.log(max([2.0, *drawn]))

    def x(ratio: float) -> float:
        return round(LABELS + (math.log(ratio) - low) / (high - low) * BARS, 1)

    device = html.escape(files[0].about["device"])
    width, height = LABELS + BARS + MARGIN, TOP + len(bars) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="10" y="22" font-size="14">{device}: time of the best peer over ours, above 1 we are faster</text>',
    ]
    for tick in (tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= math.log(tick) <= high):
        stroke = INK if tick == 1 else GRID
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="46" y2="{height - 4}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x(tick)}" y="42" text-anchor="middle">{tick:g}x</text>')
    for number, ((label, ratio), length) in enumerate(zip(bars, drawn, strict=True)):
        top, (start, stop) = TOP - 8 + number * (BAR + GAP), sorted((x(1), x(length)))
        colour, wide = WON if ratio >= 1 else LOST, max(stop - start, 0.5)
        parts.append(f'<text x="{LABELS - 8}" y="{top + 12}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(f'<rect x="{start}" y="{top}" width="{wide:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{stop + 4:.1f}" y="{top + 12}">{times(ratio)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    plots = {}
    for slug, files in machines.items():
        path = arguments.folder / f"{slug}.svg"
        path.write_text(plot(files))
        plots[slug] = os.path.relpath(path, arguments.readme.parent).replace(os.sep, "/")
    arguments.readme.write_text(insert(arguments.readme.read_text(), markdown(machines, plots)))


if __name__ == "__main__":
    main()
