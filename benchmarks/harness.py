"""How a number comes about: contenders are checked, then take turns at the same work.

A contender whose result is wrong gets no time. The clocks are in clocks.py.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vjepa.kernels import _dispatch, backend

from .clocks import Call, Clock

GIGA, TERA = 1e9, 1e12
ROUNDS = 50
FEWEST_ROUNDS = 5  # of work so slow that all rounds would take longer than BUDGET
BUDGET = 2.0  # seconds for all contenders of one work, checks and compilation apart
OURS = 2.0  # our error may be so many times that of plain PyTorch in the same dtype, as in the tests
PEERS = 10.0  # a peer may round at other places; it must still compute the same thing
COMPILED = "torch.compile"  # peers of such a name need a compiler, which may be missing


@dataclass(frozen=True)
class Work:
    """What all contenders do. Bytes and FLOP are those that the work needs, whoever does it and however."""

    op: str  # names the file of results
    name: str  # what is done to what
    dtype: str
    shapes: dict[str, list[int]]
    packing: str | None = None
    bytes_moved: int = 0
    flop: int = 0
    exps: int = 0  # exponentials, where they may be the limit
    in_place: bool = False  # writes what it has read: its ceiling is an update in place instead of a copy
    also: str | None = None  # a peer that the tables name even where another is better
    clips: int = 0  # of a training step: what clips/s counts
    about: dict[str, Any] = field(default_factory=dict)  # of a training step: see bench_step.py
    fewest_rounds: int = FEWEST_ROUNDS  # of a work for which even these take longer than BUDGET


@dataclass(frozen=True)
class Contender:
    """One way to do a work; ours have a backend, auto or by name."""

    name: str
    call: Call
    backend: str | None = None
    op: str | None = None  # ours: its name in the backend table
    memory: Callable[[], int | None] | None = None  # its peak memory, asked after the check, if not found by a call


@dataclass
class Result:
    """One contender's figures for a work: seconds, bytes, and shares of the ceilings measured in the same run."""

    contender: str
    backend: str | None  # the one asked for; None for a peer
    served_by: str | None  # the ones that served, joined by +
    median: float
    spread: float  # interquartile range
    rounds: int
    peak_memory: int | None  # bytes beyond the inputs, on a GPU; of a training step with all that it keeps
    clips_s: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    share_of_copy: float | None = None
    share_of_update: float | None = None  # in its stead, of a work in place
    share_of_gemm: float | None = None
    share_of_exp: float | None = None
    peers: dict[str, dict[str, float]] = field(default_factory=dict)  # of ours: each peer's median and ratio
    best_peer: str | None = None
    ratio: float | None = None  # best peer's median over ours: above 1 we are faster


@dataclass
class Outcome:
    """All results of one work; who failed the check or raised, and who could not run here, with the reasons."""

    work: Work
    results: list[Result] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    update_gb_s: float | None = None  # of a work in place: what `streaming` reached in the same rounds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = asdict(self)
        return {**fields.pop("work"), **fields}


class Wrong(AssertionError):
    """A contender does not compute what the work says."""


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------------- results


def flatten(output: object) -> list[Tensor]:
    """The tensors of a contender's output: a tensor, or tuples and lists of them."""
    if isinstance(output, Tensor):
        return [output.detach()]
    return [tensor for part in output for tensor in flatten(part)] if isinstance(output, tuple | list) else []


def errors(output: object, exact: Sequence[Tensor]) -> list[float]:
    """Largest error of each tensor of `output` against float64; infinite where a shape or a value is no such result."""
    tensors = flatten(output)
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in exact]:
        return [float("inf")] * len(exact)
    found = [float((a.double() - b).abs().max()) if b.numel() else 0.0 for a, b in zip(tensors, exact, strict=True)]
    return [error if error == error else float("inf") for error in found]


def check(output: object, plain: object, exact: Sequence[Tensor], factor: float) -> None:
    """Raise Wrong unless errors are at most `factor` times those of `plain`, or one rounding of the largest value."""
    ours, theirs = errors(output, exact), errors(plain, exact)
    for number, (tensor, truth) in enumerate(zip(flatten(plain), exact, strict=True)):
        rounding = torch.finfo(tensor.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
        allowed = factor * max(theirs[number], rounding)
        if not ours[number] <= allowed:
            raise Wrong(f"output {number}: error {ours[number]:.3g} against float64, allowed {allowed:.3g}")


# ---------------------------------------------------------------------------------------------------------------- turns


def peak_memory(call: Call) -> int:
    """Bytes that a call needs on the GPU beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def take_turns(
    contenders: Iterable[Contender], clock: Clock, rounds: int, fewest: int = FEWEST_ROUNDS
) -> dict[str, list[float]]:
    """Times of each contender, one in every round, so that whatever else the machine does falls on all of them.

    As many rounds as fit into BUDGET, of at most `rounds` and at least `fewest`.

    Each round has an order of its own: who follows a contender that read the same tensors finds them in the caches.
    """
    contenders = list(contenders)
    order = random.Random(0)
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= fewest and time.perf_counter() - start > BUDGET:
            break
        for contender in order.sample(contenders, len(contenders)):
            with backend(contender.backend or "auto"):
                times[contender.name].append(clock(contender.call))
    return times


# ---------------------------------------------------------------------------------------------------------- competition


def compiled(function: Callable[..., object], dynamic: bool = False) -> Callable[..., object]:
    """torch.compile of a peer for these shapes alone, as its users would at best have it, or for all if `dynamic`."""
    torch._dynamo.reset()  # its cache belongs to the code of `function`, which other works may have filled
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def streaming(device: torch.device) -> dict[Contender, int]:
    """Updates in place of arrays far beyond the caches, and the bytes that they move; the faster one is the ceiling.

    A processor reads a line before it writes to it, so that a plain copy moves half as much again as it counts, and an
    update in place does not. They take turns with the contenders: what memory gives changes from minute to minute.
    """
    target, source = (torch.randn(1 << (28 if device.type == "cuda" else 25), device=device) for _ in range(2))
    return {
        Contender("addition in place", lambda: target.add_(source, alpha=0.5)): 3 * target.nbytes,
        Contender("scaling in place", lambda: target.mul_(-0.999)): 2 * target.nbytes,
    }


def ours(op: str, device: torch.device, call: Call) -> list[Contender]:
    """`call` under auto and under each backend that serves `op` at full speed (Triton's interpreter does not)."""
    rows = _dispatch.explain(op, device)
    names = [name for name, says in rows.items() if says in _dispatch.RUNS]
    names = ["auto", *(name for name in names if not (name == "triton" and device.type == "cpu"))]
    return [Contender(f"vjepa ({name})", call, name, op) for name in names]


@contextmanager
def noting(op: str | None) -> Iterator[set[str]]:
    """Collects the names of the backends that serve `op` inside the `with` block, forward or backward."""
    names: set[str] = set()
    select = _dispatch.select

    def noted(asked: str, device: torch.device, *arguments: object) -> _dispatch.Row:
        row = select(asked, device, *arguments)
        if asked == op:
            names.add(row.name)
        return row

    _dispatch.select = noted
    try:
        yield names
    finally:
        _dispatch.select = select


def compete(
    work: Work,
    contenders: Sequence[Contender],
    verify: Callable[[Call, float], None],
    clock: Clock,
    device: torch.device,
    rounds: int = ROUNDS,
) -> Outcome:
    """Check each contender with `verify(call, factor)`, then time those that pass.

    Who raises or is wrong has failed, except that a compiled peer which raises, for want of a compiler or otherwise,
    a backend of ours that says that it cannot serve such arguments, and who does not fit into memory are left out.
    """
    outcome = Outcome(work)
    passed, peaks, served = [], {}, {}
    for contender in contenders:
        try:
            with backend(contender.backend or "auto"), noting(contender.op) as served[contender.name]:
                verify(contender.call, PEERS if contender.backend is None else OURS)
                if contender.memory is not None:
                    peaks[contender.name] = contender.memory()
                else:
                    peaks[contender.name] = peak_memory(contender.call) if device.type == "cuda" else None
            passed.append(contender)
        except (AssertionError, RuntimeError, ValueError, TypeError, OSError, subprocess.CalledProcessError) as error:
            sentence = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            no_compiler = contender.name.startswith(COMPILED) and not isinstance(error, Wrong)
            too_large = isinstance(error, torch.OutOfMemoryError)
            cannot = no_compiler or too_large or f"the backend {contender.backend} cannot serve" in sentence
            (outcome.left_out if cannot else outcome.failed)[contender.name] = sentence
    streams = streaming(device) if work.in_place and rounds else {}
    times = take_turns([*passed, *streams], clock, rounds, work.fewest_rounds)
    if streams:
        rates = [moved / statistics.median(times[stream.name]) for stream, moved in streams.items()]
        outcome.update_gb_s = max(rates) / GIGA
    for contender in passed:
        measured = times[contender.name]
        if not measured:
            continue
        low, _, high = statistics.quantiles(measured, n=4)
        median, peak = statistics.median(measured), peaks[contender.name]
        served_by = "+".join(sorted(served[contender.name])) or None
        result = Result(contender.name, contender.backend, served_by, median, high - low, len(measured), peak)
        outcome.results.append(result)
    set_rates(outcome)
    return outcome


def set_rates(outcome: Outcome) -> None:
    """Rates, and the ratios of ours to the peers."""
    peers = {result.contender: result.median for result in outcome.results if result.backend is None}
    best = min(peers, key=peers.__getitem__, default=None)
    for result in outcome.results:
        if outcome.work.bytes_moved:
            result.gb_s = outcome.work.bytes_moved / result.median / GIGA
            if outcome.update_gb_s:
                result.share_of_update = result.gb_s / outcome.update_gb_s
        if outcome.work.clips:
            result.clips_s = outcome.work.clips / result.median
        if outcome.work.flop:
            result.tflop_s = outcome.work.flop / result.median / TERA
        if result.backend is not None and best is not None:
            result.peers = {name: {"median": median, "ratio": median / result.median} for name, median in peers.items()}
            result.best_peer, result.ratio = best, peers[best] / result.median
