"""The largest batch that fits on a GPU, and the time of a clip in it. Each contender finds its own, alone in memory.

The compiled contender is left out: it would compile again for each size that is tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from vjepa.kernels import backend

from .bench_step import NAMES
from .clocks import Clock
from .contenders import Runner, contenders, work_of
from .harness import FEWEST_ROUNDS, Contender, Outcome, Result, Work, set_rates
from .steps import workload

MODEL = "vit_large"
FIRST, MOST = 24, 192  # clips
FINEST = 16  # clips by which the result may be short of what fits


@pytest.mark.timeout(900)
def bench_step_largest(race, device, reference_repo):
    if device.type == "cpu":
        pytest.skip("what fits is a question for a GPU: a CPU has memory to spare")

    def measure(entry: Work, found: Sequence[Contender], verify: None, clock: Clock, device: torch.device, rounds: int):
        return largest_batches(entry, clock, device, reference_repo) if rounds else Outcome(entry)

    work = workload(MODEL, 1, torch.bfloat16, device)
    name = f"{NAMES[MODEL]}, a clip in the largest batch that fits"
    race(work_of(work, name, FEWEST_ROUNDS, batches={}), [], None, measure=measure)


def largest_batches(entry: Work, clock: Clock, device: torch.device, reference_repo: str | None) -> Outcome:
    """Seconds of a clip for each contender; `about` of the entry keeps their batches."""
    outcome = Outcome(entry)
    everybody = contenders(workload(MODEL, 1, torch.bfloat16, device), reference_repo)
    for number, contender in enumerate(everybody):
        prepare = partial(prepared, number, device, reference_repo)
        clips, peak = largest(partial(peak_of, prepare))
        if not clips:
            outcome.left_out[contender.name] = f"OutOfMemoryError: {FIRST} clips do not fit"
            continue
        runner = prepare(clips)
        with backend(contender.backend or "auto"):
            runner()
            times = [clock(runner) / clips for _ in range(FEWEST_ROUNDS)]
        runner.free()
        low, median, high = statistics.quantiles(times, n=4)
        entry.about["batches"][contender.name] = clips
        result = Result(contender.name, contender.backend, None, median, high - low, len(times), peak)
        outcome.results.append(result)
    set_rates(outcome)
    return outcome


def prepared(number: int, device: torch.device, reference_repo: str | None, clips: int) -> Runner:
    """Contender `number`, ready for steps on so many clips."""
    contender = contenders(workload(MODEL, clips, torch.bfloat16, device), reference_repo)[number]
    with backend(contender.backend or "auto"):
        contender.call.restart()
    return contender.call


def peak_of(prepare: Callable[[int], Runner], clips: int) -> int | None:
    """Bytes that steps on so many clips take, or None if they do not fit."""
    runner = None
    try:
        runner = prepare(clips)
        runner()
        return runner.memory()
    except torch.OutOfMemoryError:
        return None
    finally:
        if runner is not None:
            runner.free()


def largest(attempt: Callable[[int], int | None]) -> tuple[int, int]:
    """The largest batch for which `attempt` tells its peak memory, and that memory; (0, 0) if not even FIRST fits.

    Doubles until something does not fit, then halves the interval down to FINEST.
    """
    fits, peak, beyond = 0, 0, MOST + 1
    clips = FIRST
    while fits < clips < beyond:
        found = attempt(clips)
        if found is None:
            beyond = clips
        else:
            fits, peak = clips, found
        if beyond > MOST:
            clips = min(2 * fits, MOST)
        elif fits and beyond - fits > FINEST:
            clips = fits + max(1, (beyond - fits) // 2 // FINEST) * FINEST
    return fits, peak
