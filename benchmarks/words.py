"""How figures are written in the terminal, in the README and in plots. Needs the standard library alone."""

from __future__ import annotations

from typing import Any

Work = dict[str, Any]  # one entry of "works" in a file, see Outcome in harness.py
Result = dict[str, Any]


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


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rate(row: Result, work: Work | None = None) -> str:
    """The figure that is nearer to its ceiling, and its share of it; of a training step its model-FLOP utilisation."""
    copy, update, gemm, exp = (row.get(f"share_of_{ceiling}") or 0.0 for ceiling in ("copy", "update", "gemm", "exp"))
    if is_step(work) and gemm:
        return f"{digits(row['tflop_s'])} TFLOP/s ({gemm:.0%} MFU)"
    if update > gemm:
        return f"{digits(row['gb_s'])} GB/s ({update:.0%} of an update)"
    if not copy and not gemm:
        return ""
    if exp > max(copy, gemm):
        return f"{digits(row['tflop_s'])} TFLOP/s ({exp:.0%} of the exp units)"
    figure = f"{digits(row['gb_s'])} GB/s" if copy >= gemm else f"{digits(row['tflop_s'])} TFLOP/s"
    return f"{figure} ({max(copy, gemm):.0%})"


def is_step(work: Work | None) -> bool:
    """Whether a work is a training step or a part of one."""
    return bool(work and work.get("about"))


def step_figures(row: Result, work: Work) -> list[str]:
    """Of a training step clips/s, its batch where each contender has its own, and peak memory."""
    if not is_step(work):
        return []
    words = [f"{digits(row['clips_s'])} clips/s"] if row.get("clips_s") else []
    batches = work["about"].get("batches", {})
    words += [f"batches of {batches[row['contender']]}"] if row["contender"] in batches else []
    return words + ([f"{row['peak_memory'] / 1e9:.2f} GB"] if row.get("peak_memory") else [])


def title(work: Work) -> str:
    """What was done to what, in which dtype and packing."""
    return ", ".join([work["name"], short(work["dtype"])] + ([work["packing"]] if work["packing"] else []))


def short(dtype: str) -> str:
    return dtype.replace("bfloat16", "bf16").replace("float32", "fp32")


def about_line(about: dict[str, Any], short: bool = False) -> str:
    """The device (not if `short`) and the versions in one line."""
    commit = about["commit"] and about["commit"][:10] + "+" * about["commit"].endswith("+")
    named = ("driver", "torch", "triton", "cuda", "python")
    words = [f"{name} {about[name]}" for name in named if about[name]] + ([f"commit {commit}"] if commit else [])
    return ", ".join(([] if short else [about["device"]]) + words + [about["date"]])
