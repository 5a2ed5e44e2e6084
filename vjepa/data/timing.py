"""How fast clips of a data set are read, what the time goes into, and how that compares with a naive loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import av
import numpy as np
import torch

from vjepa.data.batch import ClipRef
from vjepa.data.clip import ClipSpec, FixedPlacement, load_clip
from vjepa.data.config import DataConfig
from vjepa.data.loader import BatchMaker, ClipLoader
from vjepa.data.naive import naive_clip
from vjepa.data.stopwatch import PARTS, Stopwatch
from vjepa.data.tensors import is_tensor_file

SAME = 4.0  # mean difference of pixels, of 255, above which a naive clip is not compared: it is twice what resampling makes
COLLATED = 4  # clips a batch when worker processes are timed


@dataclass
class Timing:
    """What was measured; times in seconds, summed over the clips.

    Attributes:
        clips: clips read by one worker, in this process, on one thread.
        seconds: their wall time; `cpu_seconds` the processor time spent meanwhile.
        parts: part (see stopwatch.PARTS) -> seconds.
        compared: clips that the naive loop read too, with the same content.
        ours, naive: processor time of those, by us and by the naive loop, in turns: what else the machine does matters less.
        difference: mean and largest difference between ours and the naive loop's pixels, of 255, over those clips.
        bytes: size of the different files read.
        files: how many.
        bad: path -> reason of files that were skipped.
        workers: worker processes timed; 0 for none.
        workers_rate: clips/s of all of them together.
    """

    clips: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    compared: int = 0
    ours: float = 0.0
    naive: float = 0.0
    difference: tuple[float, float] = (0.0, 0.0)
    bytes: int = 0
    files: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    workers: int = 0
    workers_rate: float = 0.0

    @property
    def rate(self) -> float:
        """Clips/s of one worker."""
        return self.clips / self.seconds

    @property
    def core_rate(self) -> float:
        """Clips per second of processor time."""
        return self.clips / self.cpu_seconds

    @property
    def busy(self) -> float:
        """Share of the wall time for which the worker had a core: less than 1 on a busy machine or slow storage."""
        return self.cpu_seconds / self.seconds

    @property
    def ratio(self) -> float:
        """Processor time of the naive loop over ours; nan where nothing could be compared."""
        return self.naive / self.ours if self.compared else math.nan

    def workers_for(self, step_seconds: float, batch_size: int) -> int:
        """Workers that feed a step: ceil(batch_size / (step_seconds * rate))."""
        return max(1, math.ceil(batch_size / (step_seconds * self.rate)))

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for a JSON file."""
        ratio = self.ratio if self.compared else None
        parts = {part: seconds / self.clips for part, seconds in self.parts.items()}
        values = {name: value for name, value in vars(self).items() if name != "parts"}
        return {**values, "rate": self.rate, "core_rate": self.core_rate, "ratio": ratio, "seconds_a_clip": parts}


def time_clips(
    config: DataConfig, num_frames: int, image_size: tuple[int, int], batch_size: int, clips: int, seed: int = 0
) -> Timing:
    """Time reading, in this process and on one thread, and in `config.num_workers` processes where that is not 0.

    Every clip is read once before anything is timed, which fills the system's cache of files and gives the pixels that
    the naive loop's are compared with; then we and the naive loop read the same clips in turns.

    Args:
        config: where the videos are and how clips are taken from them.
        num_frames, image_size, batch_size: T, (H, W) and B.
        clips: how many clips.
        seed: of the clips drawn.

    Raises:
        DataError: as ClipLoader.
        ValueError: an argument out of range.
    """
    if clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}")
    loader = ClipLoader(config, num_frames, image_size, min(batch_size, clips), seed=seed)
    spec, timing = loader.maker.spec, Timing()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = _choose(loader.maker, clips, timing)
        _time(spec, chosen, min(batch_size, clips), timing)
    finally:
        torch.set_num_threads(threads)
    sizes = {ref.path: os.path.getsize(ref.path) for ref, _ in chosen}
    timing.bytes, timing.files = sum(sizes.values()), len(sizes)
    if config.num_workers:
        _time_workers(config, spec, clips, seed, timing)
    return timing


def _choose(maker: BatchMaker, clips: int, timing: Timing) -> list[tuple[ClipRef, bool]]:
    """The clips to time, and whether the naive loop's is the same; fills in `bad` and `difference`."""
    chosen: list[tuple[ClipRef, bool]] = []
    differences: list[float] = []
    for step in range(math.ceil(clips / maker.batch_size)):
        batch = maker.make(step)
        timing.bad.update((file.path, file.reason) for file in batch.bad)
        for ref, ours in zip(batch.clips, batch.video, strict=True):
            difference = _difference(ref, ours, maker.spec) if len(chosen) < clips else math.inf
            chosen.append((ref, difference <= SAME))
            differences += [difference] * (difference <= SAME)
    if differences:
        timing.difference = (float(np.mean(differences)), max(differences))
    return chosen[:clips]


def _difference(ref: ClipRef, ours: torch.Tensor, spec: ClipSpec) -> float:
    """Mean difference between our pixels and the naive loop's; infinite where it cannot read the clip."""
    if is_tensor_file(ref.path):
        return math.inf
    try:
        naive = naive_clip(ref, spec.num_frames, spec.image_size)
    except (av.error.FFmpegError, OSError, ValueError, TypeError, IndexError):  # what such a loop dies of
        return math.inf
    return float((ours.float() - naive.float()).abs().mean())


def _time(spec: ClipSpec, chosen: list[tuple[ClipRef, bool]], batch_size: int, timing: Timing) -> None:
    watch = Stopwatch()
    batch = np.empty((batch_size, spec.channels, spec.num_frames, *spec.image_size), np.uint8)
    for number, (ref, same) in enumerate(chosen):
        placement = FixedPlacement(ref.start, ref.crop, ref.flip)
        began, cpu = time.perf_counter(), time.process_time()
        watch.start()
        batch[number % batch_size] = load_clip(ref.path, spec, placement, watch).pixels
        watch("collate")
        cpu = time.process_time() - cpu
        timing.clips, timing.cpu_seconds = timing.clips + 1, timing.cpu_seconds + cpu
        timing.seconds += time.perf_counter() - began
        if same:
            timing.compared, timing.ours = timing.compared + 1, timing.ours + cpu
            cpu = time.process_time()
            batch[number % batch_size] = naive_clip(ref, spec.num_frames, spec.image_size).numpy()
            timing.naive += time.process_time() - cpu
    timing.parts = watch.seconds


def _time_workers(config: DataConfig, spec: ClipSpec, clips: int, seed: int, timing: Timing) -> None:
    """Clips/s of all workers from when each has delivered once, and while more is asked for, so that all are busy."""
    config = replace(config, prefetch=1)
    loader = ClipLoader(config, spec.num_frames, spec.image_size, COLLATED, seed=seed)
    count = math.ceil(clips / COLLATED)
    batches: Iterator[Any] = loader.batches(0, count + 3 * config.num_workers)
    for _ in range(config.num_workers):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    timing.workers, timing.workers_rate = config.num_workers, count * COLLATED / (time.perf_counter() - began)
    batches.close()  # type: ignore[attr-defined]
