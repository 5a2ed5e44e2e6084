"""The fixtures of the benchmarks; how they measure is told in harness.py.

    pytest benchmarks --benchmark-only                     prints our ratios to the best peer, one line for each work
    pytest benchmarks --benchmark-only --results [FOLDER]  also writes <op>-<device>.json (default benchmarks/results)
    pytest benchmarks --benchmark-disable                  checks all contenders and times none
    pytest benchmarks --reference-repo PATH ...            the released V-JEPA code, checked out at PATH, takes part

The environment variable OUT names the folder too. report.py makes the README's table and the plots from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vjepa.kernels import backend

from . import report
from .clocks import Call, Clock, DeviceClock, HostClock
from .harness import ROUNDS, Contender, Outcome, Work, check, compete, ours
from .machine import Ceilings, machine, measure_ceilings, slug

DEFAULT_RESULTS = Path(__file__).parent / "results"
OUTCOMES = pytest.StashKey[list[dict]]()
ABOUT = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "write JSON to this folder (default: OUT, or benchmarks/results)"
    parser.addoption("--results", nargs="?", const=str(DEFAULT_RESULTS), default=os.environ.get("OUT"), help=help_text)
    parser.addoption("--reference-repo", metavar="PATH", help="a checkout of the released V-JEPA code, for bench_step")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise pytest.UsageError(
            "benchmarks: TRITON_INTERPRET is set, and the interpreter's times say nothing; unset it"
        )
    if path := config.getoption("--reference-repo"):
        from .released import check_checkout  # here: it needs the model, which most benchmarks do not

        try:
            check_checkout(path)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
    config.stash[OUTCOMES] = []
    config.option.benchmark_quiet = True  # its table would hold the time of all contenders together
    config.option.showcapture = "no"  # torch.compile logs thousands of lines


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _same_precision_for_all() -> Iterator[None]:
    """float32 means float32 in the peers' convolutions too, whose algorithm cuDNN may choose by trying."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, True
    yield
    cudnn.allow_tf32, cudnn.benchmark = before


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()


@pytest.fixture(scope="session")
def ceilings(device: torch.device, clock: Clock, request: pytest.FixtureRequest) -> Ceilings:
    return measure_ceilings(device, clock)


@pytest.fixture(scope="session")
def reference_repo(request: pytest.FixtureRequest) -> str | None:
    return request.config.getoption("--reference-repo")


@pytest.fixture
def race(
    benchmark, request: pytest.FixtureRequest, device: torch.device, clock: Clock, ceilings: Ceilings
) -> Callable[..., None]:
    """race(work, contenders, verify) times the contenders that pass verify(call, factor), which raises if one is wrong.

    other_clock: instead of the session's. measure: what returns the outcome, instead of `compete`.
    """

    def run(
        work: Work,
        contenders: Sequence[Contender],
        verify: Callable[[Call, float], None],
        other_clock: Clock | None = None,
        measure: Callable[..., Outcome] = compete,
    ) -> None:
        rounds = ROUNDS if benchmark.enabled else 0
        outcome = benchmark.pedantic(measure, (work, contenders, verify, other_clock or clock, device, rounds))
        ceilings.set_shares(outcome)
        record(request.config, outcome, ceilings, device)
        if outcome.failed:
            pytest.fail(f"{work.op}, {work.name}: {outcome.failed}", pytrace=False)

    return run


@pytest.fixture
def compare(race: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """compare(work, operator, call, peers, exact) times `call` under each backend of `operator` beside the peers.

    exact: float64 tensors, what everybody's output is compared with, or verify(call, factor), which raises
    AssertionError if `call` does not do the work. other_clock: instead of the session's.
    """

    def run(
        work: Work,
        operator: str,
        call: Call,
        peers: Mapping[str, Call],
        exact: tuple[Tensor, ...] | None = None,
        verify: Callable[[Call, float], None] | None = None,
        other_clock: Clock | None = None,
    ) -> None:
        if exact is not None:
            with backend("reference"):
                plain = call()

            def verify(contender: Call, factor: float) -> None:
                check(contender(), plain, exact, factor)

        assert verify is not None
        assert work.also is None or work.also in peers
        contenders = [*ours(operator, device, call), *(Contender(name, peer) for name, peer in peers.items())]
        race(work, contenders, verify, other_clock)

    return run


def record(config: pytest.Config, outcome: Outcome, ceilings: Ceilings, device: torch.device) -> None:
    """Keep an outcome and write the file of its op at once: a run that is cut short has written what it measured."""
    if ABOUT not in config.stash:
        config.stash[ABOUT] = machine(device)
    about, outcomes = config.stash[ABOUT], config.stash[OUTCOMES]
    outcomes.append(outcome.as_dict())
    if folder := config.getoption("--results"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {
            "machine": about,
            "ceilings": asdict(ceilings),
            "works": [work for work in outcomes if work["op"] == outcome.work.op],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (Path(folder) / f"{outcome.work.op}-{slug(about)}.json").write_text(text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[OUTCOMES]:
        terminalreporter.section("vjepa: time of the best peer over ours")
        for line in report.lines(config.stash[ABOUT], config.stash[OUTCOMES]):
            terminalreporter.write_line(line)
