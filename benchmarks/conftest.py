"""How the benchmarks measure: results are checked first, then all contenders take turns, and their ratios are printed.

    pytest benchmarks --benchmark-only                     prints the tables
    pytest benchmarks --benchmark-only --results [FOLDER]  also writes <op>-<device>.json (default benchmarks/results)

The environment variable OUT names the folder too. A time alone says little: each row has its GB/s or TFLOP/s, and each
of our rows its ratio to the best peer beside it (above 1: faster than the peer).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 15
OURS = "vjepa"
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Row:
    """One contender on one work. Times in seconds; bytes and FLOP are those the work needs, whoever does it."""

    op: str
    work: str  # shapes, dtype, packing
    contender: str
    median: float
    spread: float  # interquartile range
    bytes_moved: int
    flop: int
    peak_memory: int | None  # bytes, on a GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "write JSON to this folder (default: OUT, or benchmarks/results)"
    parser.addoption("--results", nargs="?", const=str(DEFAULT_RESULTS), default=os.environ.get("OUT"), help=help_text)


ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """compare(op, work, contenders, bytes_moved=..., flop=0) times the contenders, a dict from names to callables.

    The first is ours, the rest are peers; the test has checked what each returns. They take turns, so that whatever
    else the machine does in the meantime falls on all of them. pytest-benchmark times ours, the peers run in its setup.
    """

    def run(
        op: str, work: str, contenders: dict[str, Callable[[], object]], *, bytes_moved: int, flop: int = 0
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, int] = {}

        def timed(name: str) -> None:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            contenders[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            times[name].append(time.perf_counter() - start)

        first, *peers = contenders
        assert first.startswith(OURS)
        benchmark.group = f"{op}: {work}"
        benchmark.pedantic(timed, args=(first,), setup=lambda: [timed(name) for name in peers] and None, rounds=ROUNDS)
        for name in contenders:
            kept = times[name][-ROUNDS:]
            low, _, high = statistics.quantiles(kept, n=4)
            middle = statistics.median(kept)
            row = Row(op, work, name, middle, high - low, bytes_moved, flop, peaks.get(name))
            request.config.stash[ROWS].append(row)

    return run


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What a number cannot be read without."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else (models or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else "") if commit.returncode == 0 else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def best_peer(rows: list[Row], row: Row) -> float:
    """Median time of the fastest other contender on the same work."""
    return min(
        (r.median for r in rows if (r.op, r.work) == (row.op, row.work) and not r.contender.startswith(OURS)),
        default=float("nan"),
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    write = terminalreporter.write_line
    terminalreporter.section("vjepa: ratios to the best peer")
    write(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    for op, work in dict.fromkeys((row.op, row.work) for row in rows):
        write(f"{op}: {work}")
        for row in sorted((r for r in rows if (r.op, r.work) == (op, work)), key=lambda r: r.median):
            rate = f"{row.bytes_moved / row.median / GIGA:8.1f} GB/s"
            rate += f" {row.flop / row.median / TERA:7.3f} TFLOP/s" if row.flop else " " * 16
            ratio = f"{best_peer(rows, row) / row.median:6.2f}x" if row.contender.startswith(OURS) else ""
            write(f"  {row.contender:32s} {row.median * 1e3:9.3f} ms +- {row.spread * 1e3:7.3f} {rate} {ratio}")
    if folder := config.getoption("--results"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for op in dict.fromkeys(row.op for row in rows):
            path = Path(folder) / f"{op}-{device.type}.json"
            content = {"machine": about, "rows": [asdict(row) for row in rows if row.op == op]}
            path.write_text(json.dumps(content, indent=1) + "\n")
            write(f"wrote {path}")
