"""`vjepa bench data`: how many clips a worker reads in a second, what the time goes into, how many workers a step needs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vjepa.cli import OK, UsageError

DESCRIPTION = (
    "Time how clips of your videos are read, on this machine: clips/s of one worker (this process, one thread), what the "
    "time goes into, the same clips by a naive PyAV loop, and how many workers a training step needs. "
    "For example: vjepa bench data my_videos --step_ms 500"
)
NAMES = {
    "open": "open, close",
    "seek": "seek",
    "read": "read packets",
    "decode": "decode",
    "filter": "crop, resize, colour",
    "collate": "collate",
}
LITTLE_WAITING = 0.9  # share of the time on a core
EXAMPLES = 5  # bad files named


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message)


def build_parser() -> Parser:
    """The options of the command."""
    parser = Parser(prog="vjepa bench data", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="PATH", help="a folder of videos (searched recursively), a manifest, or a video")
    add("--clips", type=int, default=48, metavar="N", help="clips to read (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="time N worker processes too; 0: only this process, one core (default: %(default)s)",
    )
    add("--num_frames", type=int, default=16, metavar="T", help="frames a clip (default: %(default)s)")
    add("--image_size", type=int, default=224, metavar="PIXELS", help="height and width (default: %(default)s pixels)")
    add(
        "--frame_stride",
        type=int,
        default=4,
        metavar="S",
        help="video frames from one frame of a clip to the next (default: %(default)s)",
    )
    add("--batch_size", type=int, default=24, metavar="B", help="clips a training step takes (default: %(default)s)")
    add(
        "--step_ms",
        type=float,
        metavar="X",
        help="time of a training step in ms: prints how many workers feed it (default: not given)",
    )
    add(
        "--decoder",
        default="pyav",
        metavar="NAME",
        help="pyav, torchcodec or torchcodec:cuda (NVDEC) (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the clips drawn (default: %(default)s)")
    add("--json", metavar="FILE", help="write the figures there too (default: not written)")
    add("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after `data`; returns the exit code."""
    options = build_parser().parse_args(list(argv))
    lowest = {"clips": 1, "workers": 0, "num_frames": 1, "image_size": 1, "frame_stride": 1, "batch_size": 1}
    for name, low in lowest.items():
        if getattr(options, name) < low:
            raise UsageError(f"--{name}: expected at least {low}, got {getattr(options, name)}")
    if options.step_ms is not None and not 0 < options.step_ms < float("inf"):
        raise UsageError(f"--step_ms: expected a time above 0 ms, got {options.step_ms:g}")
    if options.json is not None and not Path(options.json).resolve().parent.is_dir():
        raise UsageError(f"--json: no folder {str(Path(options.json).parent)!r} to write into")
    from vjepa.data.config import DataConfig
    from vjepa.data.timing import time_clips
    from vjepa.data.torchcodec_frames import DECODERS

    if options.decoder not in DECODERS:
        raise UsageError(f"--decoder: expected one of {', '.join(DECODERS)}, got {options.decoder!r}")
    config = DataConfig(
        options.path,
        frame_stride=options.frame_stride,
        num_workers=options.workers,
        max_bad_share=1.0,
        decoder=options.decoder,
    )
    size = (options.image_size, options.image_size)
    timing = time_clips(config, options.num_frames, size, options.batch_size, options.clips, options.seed)
    print("\n".join(report_lines(timing, options)))
    if options.json is not None:
        asked = {name: value for name, value in vars(options).items() if name not in ("json", "debug")}
        Path(options.json).write_text(json.dumps({"options": asked, **timing.summary()}, indent=1) + "\n")
    return OK


def report_lines(timing: Any, options: argparse.Namespace) -> list[str]:
    """What is printed of a vjepa.data.timing.Timing."""
    frames, size, stride = options.num_frames, options.image_size, options.frame_stride
    decoder = options.decoder
    megabytes, plural = timing.bytes / 1e6, "" if timing.files == 1 else "s"
    clip_ms = timing.seconds / timing.clips * 1e3
    lines = [
        f"{timing.clips} clips of {frames} x {size} x {size}, one frame in {stride}, from {timing.files} file{plural} "
        f"({megabytes:.1f} MB), decoder {decoder}",
        f"one worker, one thread   {timing.rate:8.1f} clips/s     {clip_ms:8.2f} ms a clip",
        f"one core                 {timing.core_rate:8.1f} clips/s of processor time{_busy(timing)}",
    ]
    for part, seconds in timing.parts.items():
        share = seconds / timing.seconds
        lines.append(f"  {NAMES[part]:<23}{'':17}{seconds / timing.clips * 1e3:10.2f} ms {share:6.0%}")
    lines += [_naive_line(timing), *_workers_lines(timing), _step_line(timing, options), *_bad_lines(timing)]
    return lines


def _busy(timing: Any) -> str:
    if timing.busy > LITTLE_WAITING:
        return ""
    return f"; the worker had a core for {timing.busy:.0%} of the time: a busy machine, or slow storage"


def _naive_line(timing: Any) -> str:
    if not timing.compared:
        return "naive PyAV loop          reads none of these clips"
    rate, (mean, largest) = timing.compared / timing.naive, timing.difference
    which = "" if timing.compared == timing.clips else f"on {timing.compared} of the clips, those it reads too, "
    return (
        f"naive PyAV loop          {rate:8.1f} clips/s of processor time; {which}ours is {timing.ratio:.2f}x as fast "
        f"(same frames; pixels differ by {mean:.1f} of 255 on average, in one clip by {largest:.1f})"
    )


def _workers_lines(timing: Any) -> list[str]:
    if not timing.workers:
        return []
    cores = os.cpu_count() or 1
    count, total = timing.workers, timing.workers_rate
    name = f"{count} worker process" + "es" * (count > 1)
    shared = "" if count <= cores else f"; more workers than this machine's {cores} processors"
    each, core = total / count, total / min(count, cores)
    return [f"{name:<25}{total:8.1f} clips/s     {each:.1f} a worker, {core:.1f} a core{shared}"]


def _step_line(timing: Any, options: argparse.Namespace) -> str:
    batch = options.batch_size
    if options.step_ms is None:
        return f"workers for a step of X ms with {batch} clips: {batch} / (X/1000 s x {timing.rate:.1f} clips/s), rounded up"
    seconds = options.step_ms / 1e3
    needed = timing.workers_for(seconds, batch)
    exact = batch / (seconds * timing.rate)
    return (
        f"a step of {options.step_ms:g} ms with {batch} clips needs {needed} worker{'s' * (needed > 1)}: "
        f"{batch} / ({seconds:g} s x {timing.rate:.1f} clips/s) = {exact:.2f}, rounded up; each wants a core of its own"
    )


def _bad_lines(timing: Any) -> list[str]:
    if not timing.bad:
        return ["no bad files met"]
    count = len(timing.bad)
    more = [f"  and {count - EXAMPLES} more"] if count > EXAMPLES else []
    examples = [f"  {path}: {reason}" for path, reason in list(timing.bad.items())[:EXAMPLES]]
    return [f"{count} bad file{'s' * (count > 1)} skipped", *examples, *more]
