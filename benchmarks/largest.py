"""The largest batch that fits on a GPU, and how fast a contender is with it. Nobody else is in memory meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from vjepa.kernels import backend

from .clocks import Clock
from .contenders import Runner, contenders
from .harness import COMPILED, FEWEST_ROUNDS, Contender, Outcome, Result, Work, set_rates
from .steps import workload

FIRST, MOST = 24, 384  # clips; beyond, a step is no longer one of the recipe's
FINEST = 8  # clips by which the result may be short of what fits


def largest_batches(
    entry: Work, model: str, reference_repo: str | None, clock: Clock, device: torch.device
) -> Outcome:
    """Seconds of a clip for each contender, in batches of its own size, which `about` keeps; the compiled one is left
    out: it would compile for each size that is tried."""
    outcome = Outcome(entry)
    batches = entry.about.setdefault("batches", {})
    names = [contender.name for contender in contenders(workload(model, 1, torch.bfloat16, device), reference_repo)]
    for name in names:
        times: list[float] = []
        peak = 0

        def attempt(clips: int, name: str = name, times: list[float] = times) -> int | None:
            return measure(lambda work: _by_name(work, name, reference_repo), model, clips, clock, device, times)

        clips, peak = largest(attempt)
        if not clips:
            outcome.left_out[name] = f"OutOfMemoryError: {FIRST} clips do not fit"
            continue
        batches[name] = clips
        low, _, high = statistics.quantiles(times, n=4)
        asked = name.removeprefix("vjepa (").removesuffix(")") if name.startswith("vjepa (") else None
        median = statistics.median(times)
        result = Result(name, asked, None, median / clips, (high - low) / clips, len(times), peak)
        outcome.results.append(result)
    outcome.left_out[COMPILED] = "it would compile again for each size that is tried"
    set_rates(outcome)
    return outcome


def largest(attempt: Callable[[int], int | None]) -> tuple[int, int]:
    """The largest batch for which `attempt` returns its peak memory (None: it does not fit), and that memory; (0, 0) if
    not even FIRST fits. Doubles, then halves the interval down to FINEST; the last successful attempt is the result's."""
    fits, peak, beyond = 0, 0, MOST + FINEST
    clips = FIRST
    while fits + FINEST < beyond and clips <= MOST:
        found = attempt(clips)
        if found is None:
            beyond = clips
        else:
            fits, peak = clips, found
        if not fits:
            break
        clips = min(2 * fits, MOST) if beyond > MOST else (fits + beyond) // 2 // FINEST * FINEST
        if clips <= fits:
            break
    return fits, peak


def measure(
    choose: Callable[..., Contender],
    model: str,
    clips: int,
    clock: Clock,
    device: torch.device,
    times: list[float],
) -> int | None:
    """Peak memory with so many clips, and in `times` the seconds of steps; None if they do not fit."""
    contender = choose(workload(model, clips, torch.bfloat16, device))
    runner: Runner = contender.call
    try:
        with backend(contender.backend or "auto"):
            runner.restart()
            runner()
            peak = runner.memory()
            found = [clock(runner) for _ in range(FEWEST_ROUNDS)]
    except torch.OutOfMemoryError:
        return None
    finally:
        runner.free()
    times[:] = found
    return peak


def _by_name(work: object, name: str, reference_repo: str | None) -> Contender:
    (found,) = (contender for contender in contenders(work, reference_repo) if contender.name == name)
    return found
