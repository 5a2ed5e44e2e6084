"""The contenders of bench_ema and bench_optimizer do what they are timed for, and their checks would notice if not."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    """bench_ema, bench_optimizer and machine, imported as the package that they are."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("bench_ema", "bench_optimizer", "machine")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


@pytest.mark.parametrize("available", [13e9, 4e6])
def test_a_large_network_is_not_made_where_memory_is_short(benchmarks, monkeypatch, available):
    bench = benchmarks.bench_optimizer
    monkeypatch.setattr(bench, "available_memory", lambda: available)
    monkeypatch.setattr(bench, "Network", None)
    with pytest.raises(pytest.skip.Exception, match=f"14 GB of memory are needed, {available / 1e9:.1f} GB"):
        bench.bench_optimizer_large(None, torch.device("cpu"))
    with pytest.raises(pytest.skip.Exception, match="have this size"):
        bench.bench_optimizer_large(None, torch.device("cuda"))


def test_available_memory_is_that_of_the_machine_or_of_its_container(benchmarks, monkeypatch, tmp_path):
    machine = benchmarks.machine
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n"}
    monkeypatch.setattr(
        machine, "Path", lambda name: SimpleNamespace(exists=lambda: name in files, read_text=lambda: files[name])
    )
    assert machine.available_memory() == 5 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert machine.available_memory() == 5 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4000\n"
    assert machine.available_memory() == 3000
    files.clear()
    assert machine.available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


SHAPES = [(5, 3), (7,)]  # of a network as small as these, for the check of the optimizers


def small_network(benchmarks, monkeypatch, **options):
    bench = benchmarks.bench_optimizer
    monkeypatch.setattr(bench, "shapes", lambda width, depth: SHAPES)
    return bench, bench.Network(torch.device("cpu"), ("small", 0, 0), copies=True, **options)


@pytest.mark.parametrize("clip", [False, True])
def test_every_way_to_step_passes_the_check_again_and_again(benchmarks, monkeypatch, clip):
    bench, network = small_network(benchmarks, monkeypatch, clip=clip)
    peers = bench.CLIPPED_PEERS if clip else bench.PEERS
    monkeypatch.setattr(bench, "compiled", lambda function, dynamic: function)
    steps = [make(network) for make in peers.values()]
    factors = {"grad_factor": [network.factor]} if clip else {}
    grads = [grad.clone() for grad in network.grads]
    for step in [bench.Step(network, network.ours, lambda: network.ours.step(**factors)), *steps] * 3:
        bench.verify(step, 1.0)
    for grad, before in zip(network.grads, grads, strict=True):
        assert torch.equal(grad, before)
    assert network.factor is None or network.factor == 1


@pytest.mark.parametrize("mistake", ["params", "shadows", "copies", "factor"])
def test_the_check_of_a_step_finds_mistakes(benchmarks, monkeypatch, mistake):
    bench, network = small_network(benchmarks, monkeypatch, clip=True, every=3)
    step = bench.clipped(network, inside=False)
    if mistake == "factor":
        step.calls = step.calls[1:]
    else:
        wrong = {"params": network.weights, "shadows": network.shadows, "copies": network.copies[1]}[mistake]
        step.calls += (lambda: wrong[1].view(-1)[6:].mul_(1.01),)
    with pytest.raises(AssertionError):
        bench.verify(step, 1.0)


def test_every_way_to_average_passes_the_check(benchmarks):
    bench = benchmarks.bench_ema
    targets, sources = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    verify = bench.verifier(targets, sources)
    for call in bench.peers(targets, sources).values():
        for _ in range(3):
            verify(call, 1.0)
    with pytest.raises(AssertionError):
        verify(lambda: bench.foreach_lerp(targets[:1], sources[:1]), 1.0)
