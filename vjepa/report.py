"""One self-contained HTML file about a run: curves, pictures, tables and facts, with nothing loaded from anywhere.

The curves come from the run directory (metrics.jsonl), the facts from its config.json and the machine; the caller adds
pictures (masks over frames, PCA of features) and tables (probe accuracies).
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vjepa import charts
from vjepa.visualize import png_bytes

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1f26; --soft: #59626e; --edge: #d9dde3; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e8ebef; --soft: #a3acb8; --edge: #333a43; --panel: #1c2026; }
}
* { box-sizing: border-box; }
body { margin: 0; padding-bottom: 40px; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui,
  sans-serif; }
main, header { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .8rem; font-size: 1.25rem; }
h3 { margin: 0 0 .2rem; font-size: 1rem; }
p { margin: .3rem 0; }
.soft, figcaption p { color: var(--soft); font-size: .92rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px; }
figure { display: flex; flex-direction: column; justify-content: space-between; min-width: 0; margin: 0 0 16px;
  padding: 14px; background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; }
figcaption { margin-bottom: .5rem; }
.charts figure { margin: 0; }
.legend span { margin-right: 1em; }
.picture, .scroll { overflow-x: auto; }
.picture img { display: block; height: auto; max-width: 100%; margin: 0 auto; border-radius: 4px; }
@media (max-width: 700px) { .picture img { max-width: none; width: 680px; } }
table { border-collapse: collapse; width: 100%; margin-bottom: 16px; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--edge); text-align: left; vertical-align: bottom; }
thead th { border-bottom-width: 2px; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
caption { text-align: left; margin-bottom: .4rem; }
tr.best td { font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
details { margin-top: 1rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; padding: 12px; background: var(--panel); border: 1px solid var(--edge); border-radius: 8px;
  font-size: .85rem; line-height: 1.4; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 1.2rem 0 0; padding: 0; }
.tiles li { list-style: none; flex: 1 1 150px; padding: 10px 14px; background: var(--panel); border: 1px solid
  var(--edge); border-radius: 8px; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: .88rem; }
.events { padding: 10px 14px 10px 30px; border-left: 4px solid #d97706; background: var(--panel); }
"""


@dataclass(frozen=True)
class Figure:
    """A picture: PNG bytes, or uint8 [height,width,3]; `alt` says in words what it shows (the title by default)."""

    title: str
    image: bytes | np.ndarray
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Table:
    """A table: texts or numbers in rows as long as `columns`; `best` is the row to stress."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]
    caption: str = ""
    best: int | None = None


@dataclass(frozen=True)
class Chart:
    """Which numbers of metrics.jsonl share a chart: `keys` maps each to its name in the legend."""

    title: str
    y_label: str
    keys: Mapping[str, str]
    caption: str = ""


CHARTS = (
    Chart(
        "Loss",
        "mean |prediction - target|",
        {"loss": "loss"},
        "L1 between predicted and layer-normalised target features.",
    ),
    Chart(
        "Target spread", "standard deviation", {"target_std": "targets"}, "Over tokens. Close to zero means collapse."
    ),
    Chart(
        "Effective rank",
        "dimensions",
        {"effective_rank": "targets"},
        "Dimensions the targets use. Close to one means collapse.",
    ),
    Chart(
        "Prediction variance",
        "variance",
        {"predictor_variance": "predictions"},
        "Over tokens. Zero: the same answer everywhere.",
    ),
    Chart(
        "Gradient norm",
        "L2 norm before clipping",
        {"grad_norm_encoder": "encoder", "grad_norm_predictor": "predictor"},
    ),
    Chart("Learning rate", "learning rate", {"lr": "learning rate"}),
    Chart("Weight decay", "weight decay", {"weight_decay": "weight decay"}),
    Chart("Target momentum", "momentum", {"momentum": "momentum"}, "Of the moving average that is the target encoder."),
    Chart("Throughput", "clips per second", {"clips_per_s": "clips/s"}),
    Chart(
        "Time of a step",
        "seconds per step",
        {"compute_per_step": "computing", "wait_per_step": "waiting for data"},
        "Waiting as long as computing: decoding starves the model; give it more workers or smaller videos.",
    ),
)
NOT_CURVES = {"step", "data_wait_s", "compute_s", "bad_files", "skipped_clips"}  # the times are drawn per step


def write_report(
    path: str | Path,
    run_dir: str | Path,
    figures: Sequence[Figure] = (),
    tables: Sequence[Table] = (),
    *,
    title: str = "V-JEPA pretraining",
    summary: str = "",
    highlights: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report of the run in `run_dir` to `path` (UTF-8 HTML, one file) and returns the path.

    `summary` is a paragraph under the title; `highlights` are a few numbers shown large (text -> value); `facts` are
    added to what is known of the run. Raises FileNotFoundError where `run_dir` holds no metrics.jsonl, ValueError
    where it is not JSON lines.
    """
    folder = Path(run_dir)
    records = read_metrics(folder / "metrics.jsonl")
    metrics = _per_step([record for record in records if "event" not in record])
    events = [record for record in records if "event" in record]
    config_file = folder / "config.json"
    config = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    known = {**_run_facts(folder, metrics), **(facts or {})}
    sections = [
        _highlights({**_curve_highlights(metrics), **(highlights or {})}),
        _section("Results", [_table(table) for table in tables]),
        _section(
            "Training",
            [_events(events), f'<div class="charts">{"".join(metric_charts(metrics))}</div>'] if metrics else [],
        ),
        _section("Pictures", [_figure(figure) for figure in figures]),
        _section("The run", [_facts(known), _config(config)]),
    ]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(title, summary, sections), encoding="utf-8")
    return target


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line cut off by a kill is left out; another bad line is a ValueError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: expected JSON on line {number}, got {line[:60]!r}") from error
    return records


def metric_charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """One HTML figure for each chart of CHARTS that has numbers, then one for each further number that was logged."""
    claimed = {key for chart in CHARTS for key in chart.keys} | NOT_CURVES
    others = sorted({key for record in metrics for key, value in record.items() if _is_number(value)} - claimed)
    extra = [Chart(key.replace("_", " ").capitalize(), key.replace("_", " "), {key: key}) for key in others]
    return [text for chart in (*CHARTS, *extra) if (text := _chart(chart, metrics))]


def _per_step(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines with the times, which are sums since the line before, also as times of one step."""
    result, last = [], 0
    for record in metrics:
        steps = max(1, record.get("step", 0) - last)
        last = record.get("step", 0)
        times = {"compute_per_step": "compute_s", "wait_per_step": "data_wait_s"}
        result.append(
            {**record, **{name: record[key] / steps for name, key in times.items() if _is_number(record.get(key))}}
        )
    return result


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f"<li>Step {event.get('step', '?')}: {html.escape(str(event.get('message', event['event'])))}</li>"
        for event in events
    )
    return f'<ul class="events">{items}</ul>' if events else ""


def _chart(chart: Chart, metrics: Sequence[Mapping[str, Any]]) -> str:
    series = []
    for key, name in chart.keys.items():
        points = [
            (record["step"], record[key]) for record in metrics if _is_number(record.get(key)) and "step" in record
        ]
        if any(math.isfinite(y) for _, y in points):
            series.append(charts.Series(name, [x for x, _ in points], [y for _, y in points]))
    if not series:
        return ""
    ranges = []
    for one in series:
        finite = [y for y in one.y if math.isfinite(y)]
        ranges.append(
            f"{one.name}: first {finite[0]:.4g}, last {finite[-1]:.4g}, min {min(finite):.4g}, max {max(finite):.4g}"
        )
    description = f"{chart.title} over training steps. " + "; ".join(ranges)
    svg = charts.line_chart(series, x_label="step", y_label=chart.y_label, description=description)
    legend = ""
    if len(series) > 1:
        swatches = (
            f'<span><i class="swatch swatch{i}"></i>{html.escape(one.name)}</span>' for i, one in enumerate(series)
        )
        legend = f"<p class=legend>{''.join(swatches)}</p>"
    caption = f"<p>{html.escape(chart.caption)}</p>" if chart.caption else ""
    return f"<figure><figcaption><h3>{html.escape(chart.title)}</h3>{caption}{legend}</figcaption>{svg}</figure>"


def _figure(figure: Figure) -> str:
    data = figure.image if isinstance(figure.image, bytes) else png_bytes(figure.image)
    if not data.startswith(b"\x89PNG"):
        raise ValueError(
            f"figure {figure.title!r}: expected PNG bytes or a uint8 array, got bytes starting with {data[:8]!r}"
        )
    source = base64.b64encode(data).decode("ascii")
    caption = f"<p>{html.escape(figure.caption)}</p>" if figure.caption else ""
    image = f'<img alt="{html.escape(figure.alt or figure.title)}" src="data:image/png;base64,{source}">'
    heading = f"<figcaption><h3>{html.escape(figure.title)}</h3>{caption}</figcaption>"
    return f'<figure>{heading}<div class="picture">{image}</div></figure>'


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r}: expected rows of {len(table.columns)} cells, got {len(row)}: {list(row)}"
            )
    numeric = [
        bool(table.rows) and all(_is_cell_number(row[i]) for row in table.rows) for i in range(len(table.columns))
    ]

    def cells(values: Sequence[Any], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{' class=number' if right else ''}>{html.escape(_text(value))}</{tag}>"
            for value, right in zip(values, numeric, strict=True)
        )

    rows = "".join(
        f"<tr{' class=best' if number == table.best else ''}>{cells(row, 'td')}</tr>"
        for number, row in enumerate(table.rows)
    )
    caption = f"<caption><h3>{html.escape(table.title)}</h3><p class=soft>{html.escape(table.caption)}</p></caption>"
    head = f"<thead><tr>{cells(table.columns, 'th')}</tr></thead>"
    return f"<div class=scroll><table>{caption}{head}<tbody>{rows}</tbody></table></div>"


def _highlights(values: Mapping[str, str]) -> str:
    items = (
        f"<li><b>{html.escape(str(value))}</b><span>{html.escape(name)}</span></li>" for name, value in values.items()
    )
    return f'<ul class="tiles">{"".join(items)}</ul>' if values else ""


def _facts(facts: Mapping[str, Any]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
        + "</dl>"
    )


def _config(text: str) -> str:
    return f"<details><summary>Configuration</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _section(heading: str, parts: Sequence[str]) -> str:
    body = "".join(part for part in parts if part)
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>" if body else ""


def _page(title: str, summary: str, sections: Sequence[str]) -> str:
    intro = f"<p>{html.escape(summary)}</p>" if summary else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{charts.STYLE}{_STYLE}</style></head>"
        f"<body><header><h1>{html.escape(title)}</h1>{intro}</header><main>{''.join(sections)}</main></body></html>\n"
    )


def _curve_highlights(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    losses = [record["loss"] for record in metrics if _is_number(record.get("loss"))]
    if not losses:
        return {}
    return {"optimizer steps": f"{metrics[-1].get('step', len(metrics))}", "last loss": f"{losses[-1]:.4f}"}


def _run_facts(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    from vjepa import __version__

    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    bad = folder / "bad_files.jsonl"
    return {
        "Run directory": folder,
        "Steps logged": f"{len(metrics)} lines, up to step {metrics[-1].get('step', '?')}" if metrics else "none",
        "Bad files skipped": len(bad.read_text(encoding="utf-8").splitlines()) if bad.is_file() else 0,
        "Versions": f"vjepa {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors{cuda}",
        "Report written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_cell_number(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, str) and value[:1] in "+-±.0123456789" and value != "")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
