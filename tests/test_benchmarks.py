"""The benchmarks' harness judges what it times, and the report shows what was measured, lost works included."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = """
import torch
from vjepa.kernels import TokenIndices, gather_tokens
from .harness import Work, compiled

def bench_gather(compare, device):
    sets = TokenIndices.from_sets([torch.tensor([0, 2, 1])]).to(device)
    x = torch.randn(1, 4, 8, device=device)
    rows = sets.indices

    def no_compiler(x):
        raise RuntimeError("there is no compiler")

    compare(
        Work("gather", "three rows", "float32", {"x": [1, 4, 8]}, "exact", bytes_moved=192),
        "gather_tokens",
        lambda: gather_tokens(x, sets),
        {"right": lambda: x[0, rows], "torch.compile": lambda: no_compiler(x)EXTRA},
        (x[0, rows].double(),),
    )
"""
WRONG = ', "wrong": lambda: x[0, rows] * 1.001, "nan": lambda: x[0, rows] / 0 * 0, "short": lambda: x[0, :2]'


@pytest.fixture
def modules(monkeypatch):
    """clocks, harness, machine and report, imported as the package that they are."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("clocks", "harness", "machine", "report")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def run_bench(folder: Path, extra: str, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """A benchmark of its own beside the real harness; what it printed and the JSON it wrote."""
    package = folder / "benchmarks"
    package.mkdir()
    for name in ("__init__", "clocks", "conftest", "harness", "machine", "plots", "report", "words"):
        (package / f"{name}.py").write_text((ROOT / "benchmarks" / f"{name}.py").read_text())
    (package / "bench_gather.py").write_text(BENCH.replace("EXTRA", extra))
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", *options, "benchmarks"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OUT": str(folder / "results"), "COMMIT": "abc"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    (path,) = (folder / "results").glob("gather-*.json")
    return done, json.loads(path.read_text())


def test_a_run_writes_all_that_a_figure_needs(tmp_path):
    done, content = run_bench(tmp_path, "", "--benchmark-only")
    assert done.returncode == 0, done.stdout + done.stderr
    about = content["machine"]
    assert about["torch"] == torch.__version__
    assert about["commit"] == "abc"
    assert {"kind", "device", "driver", "triton", "cuda", "date"} <= set(about)
    assert content["ceilings"]["copy_gb_s"] > 0
    assert set(content["ceilings"]["gemm_tflop_s"]) == {"bfloat16", "float32"}
    (work,) = content["works"]
    assert (work["packing"], work["dtype"], work["shapes"]) == ("exact", "float32", {"x": [1, 4, 8]})
    assert work["left_out"] == {"torch.compile": "RuntimeError: there is no compiler"}
    rows = {row["contender"]: row for row in work["results"]}
    assert {"vjepa (auto)", "vjepa (reference)", "right"} <= set(rows)
    ours = rows["vjepa (reference)"]
    assert ours["served_by"] == "reference"
    assert ours["gb_s"] == pytest.approx(192 / ours["median"] / 1e9)
    assert ours["share_of_copy"] == pytest.approx(ours["gb_s"] / content["ceilings"]["copy_gb_s"])
    assert ours["best_peer"] == "right"
    assert ours["ratio"] == pytest.approx(rows["right"]["median"] / ours["median"])
    assert ours["peers"] == {"right": {"median": rows["right"]["median"], "ratio": ours["ratio"]}}
    assert "left out torch.compile: RuntimeError: there is no compiler" in done.stdout
    assert "gather: three rows, fp32, exact: auto" in done.stdout


def test_a_wrong_contender_fails_the_benchmark_and_gets_no_time(tmp_path):
    done, content = run_bench(tmp_path, WRONG, "--benchmark-only")
    assert done.returncode == 1, done.stdout + done.stderr
    (work,) = content["works"]
    assert set(work["failed"]) == {"wrong", "nan", "short"}
    assert all(reason.startswith("Wrong: output 0: error") for reason in work["failed"].values())
    assert not set(work["failed"]) & {row["contender"] for row in work["results"]}
    assert "FAILED wrong: Wrong" in done.stdout


def test_disabled_benchmarks_check_and_time_nothing(tmp_path):
    done, content = run_bench(tmp_path, WRONG, "--benchmark-disable")
    assert done.returncode == 1, done.stdout + done.stderr
    (work,) = content["works"]
    assert work["results"] == []
    assert set(work["failed"]) == {"wrong", "nan", "short"}


def test_the_interpreter_is_never_timed(modules, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op in ("gather_tokens", "tubelet_embed", "masked_l1_loss", "predictor_tokens"):
        names = [contender.backend for contender in modules.harness.ours(op, torch.device("cpu"), lambda: None)]
        assert names[0] == "auto"
        assert "reference" in names
        assert "triton" not in names


def test_the_check_allows_ours_less_than_peers(modules):
    harness = modules.harness
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    plain = exact.float() + 1e-4
    harness.check(plain, plain, (exact,), harness.OURS)
    harness.check(exact.float() + 9e-4, plain, (exact,), harness.PEERS)
    with pytest.raises(harness.Wrong, match="output 0: error"):
        harness.check(exact.float() + 9e-4, plain, (exact,), harness.OURS)
    with pytest.raises(harness.Wrong, match="error inf"):
        harness.check((plain, plain[:3]), (plain, plain), (exact, exact), harness.PEERS)


def test_contenders_take_turns_and_slow_ones_fewer(modules, monkeypatch):
    harness = modules.harness
    order = []
    contenders = [harness.Contender(name, lambda name=name: order.append(name)) for name in "ab"]
    times = harness.take_turns(contenders, lambda call: call() or 1.0, 7)
    rounds = ["".join(order[start : start + 2]) for start in range(0, 14, 2)]
    assert set(rounds) == {"ab", "ab"[::-1]}  # neither always finds what the other left in the caches
    assert len(rounds) == 7
    assert times == {"a": [1.0] * 7, "b": [1.0] * 7}
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    assert len(harness.take_turns(contenders, lambda call: 1.0, 100)["a"]) == harness.FEWEST_ROUNDS


def test_the_clock_of_a_gpu_reads_events_and_empties_the_cache(modules, monkeypatch):
    """With a stand-in for the GPU: passes over the buffer before the first event, and seconds from milliseconds."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 0.25

    buffer = SimpleNamespace(sum=lambda: log.append("read"))
    sizes = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=1 << 27))
    monkeypatch.setattr(torch, "ones", lambda size, device: sizes.append(4 * size) or buffer)
    clock = modules.clocks.DeviceClock()
    assert sizes == [1 << 29]  # four times the cache
    assert clock.passes == 5  # 1 ms at 0.25 ms each, and one
    log.clear()
    assert clock(lambda: log.append("call")) == pytest.approx(0.25e-3)
    assert log == ["read"] * 5 + ["record", "call", "record", "wait"]


def test_a_work_in_place_is_held_against_the_faster_update_that_takes_its_turns(modules, monkeypatch):
    """With a clock that says 2 ms of the updates and 1 ms of the contenders."""
    harness, called = modules.harness, []
    stream = harness.Contender("4 MB", lambda: called.append("stream"))
    streams = {stream: 4_000_000, harness.Contender("3 MB", stream.call): 3_000_000}
    monkeypatch.setattr(harness, "streaming", lambda device: streams)
    contenders = [harness.Contender("vjepa (auto)", lambda: called.append("ours"), "auto"), harness.Contender("a", int)]
    work = harness.Work("op", "name", "float32", {}, bytes_moved=1_000_000, in_place=True)

    def clock(call):
        call()
        return 2e-3 if call is stream.call else 1e-3

    def compete(work, rounds):
        outcome = harness.compete(work, contenders, lambda call, factor: None, clock, torch.device("cpu"), rounds)
        modules.machine.Ceilings(10.0, {}).set_shares(outcome)
        return outcome

    outcome = compete(work, 4)
    assert called.count("stream") == 2 * called.count("ours") == 8
    assert [row.contender for row in outcome.results] == ["vjepa (auto)", "a"]
    assert outcome.update_gb_s == pytest.approx(2.0)
    assert outcome.results[0].share_of_update == pytest.approx(0.5)
    assert outcome.results[0].share_of_copy is None
    assert compete(work, 0).update_gb_s is None
    assert called.count("stream") == 8

    copying = compete(replace(work, in_place=False), 4)
    assert called.count("stream") == 8
    assert (copying.results[0].share_of_copy, copying.results[0].share_of_update) == (pytest.approx(0.1), None)


def test_the_updates_in_place_count_what_they_move(modules):
    """Two arrays of 128 MiB read and one written, and one read and written."""
    streams = {
        stream.name: (stream.call, moved) for stream, moved in modules.harness.streaming(torch.device("cpu")).items()
    }
    target = streams["scaling in place"][0]()
    before = target[:9].clone()
    assert streams["scaling in place"][0]() is streams["addition in place"][0]() is target
    assert not torch.equal(target[:9], -0.999 * before)
    assert target.nbytes == 2**27
    assert (streams["addition in place"][1], streams["scaling in place"][1]) == (3 * 2**27, 2 * 2**27)


def entry(contender, median, backend=None, served_by=None, **more):
    facts = {"gb_s": 1000.0, "tflop_s": None, "share_of_copy": 0.5, "share_of_gemm": None, "ratio": None, "peers": {}}
    row = {"contender": contender, "backend": backend, "served_by": served_by, "median": median}
    return {**row, **facts, **more}


@pytest.fixture
def results(tmp_path):
    """Two machines: on the GPU one work won by name and one lost, with one peer left out; on the CPU one failed."""
    peers = {"slow": {"median": 4e-3, "ratio": 2.0}, "fast": {"median": 1e-3, "ratio": 0.5}}
    lost = {"ratio": 0.5, "peers": peers}
    works = [
        {
            **{"op": "gather", "name": "rows <of> a clip", "dtype": "bfloat16", "packing": "exact"},
            "results": [
                entry("vjepa (auto)", 2e-3, "auto", "reference", **lost),
                entry("vjepa (reference)", 2e-3, "reference", "reference", **lost),
                entry("vjepa (triton)", 5e-4, "triton", "triton", ratio=2.0),
                entry("fast", 1e-3),
                entry("slow", 4e-3),
            ],
            "failed": {},
            "left_out": {"torch.compile of it": "RuntimeError: no compiler\nmore"},
        }
    ]
    failed = {"op": "loss", "name": "n", "dtype": "float32", "packing": None, "results": [], "left_out": {}}
    about = {"kind": "cuda", "device": "NVIDIA X1", "driver": "1.2", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}
    about |= {"python": "3.12", "commit": "0123456789abcdef+", "date": "2026-01-02"}
    ceilings = {"copy_gb_s": 2000.0, "gemm_tflop_s": {"bfloat16": 700.0, "float32": 50.0}}
    files = {
        "gather-nvidia-x1": {"machine": about, "ceilings": ceilings, "works": works},
        "loss-cpu": {
            "machine": {**about, "kind": "cpu", "device": "Some CPU", "driver": None, "cuda": None, "commit": None},
            "ceilings": ceilings,
            "works": [{**failed, "failed": {"vjepa (cpu)": "Wrong: output 0"}}],
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def report(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_terminal_table(results):
    done = report(results)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "NVIDIA X1, driver 1.2, torch 2.11, triton 3.6, cuda 13.0, python 3.12, commit 0123456789+, 2026-01-02",
        "gather: rows <of> a clip, bf16, exact: auto 0.50x  triton 2.00x | 2.00 ms 1000 GB/s (50%) | fast 1.00 ms",
        "    left out torch.compile of it: RuntimeError: no compiler",
        "Some CPU, torch 2.11, triton 3.6, python 3.12, 2026-01-02",
        "loss: n, fp32: not timed",
        "    FAILED vjepa (cpu): Wrong: output 0",
    ]
    assert "Some CPU" not in report(results, "--kind", "cuda").stdout
    assert "holds no results" in report(results / "nowhere").stderr


def test_a_peer_that_a_work_names_is_shown_beside_the_best(modules, results):
    """As are shares of an update in place; results from before there were such fields are read as they are."""
    path = results / "gather-nvidia-x1.json"
    content = json.loads(path.read_text())
    (work,) = content["works"]
    work["also"] = "slow"
    work["results"][0] |= {"share_of_copy": None, "share_of_update": 0.8}
    path.write_text(json.dumps(content))
    assert "2.00 ms 1000 GB/s (80% of an update) | fast 1.00 ms | slow 2.00x" in report(results).stdout
    readme = results / "README.md"
    readme.write_text("<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    assert report(results, "--readme", readme).returncode == 0
    row = "| 1000 GB/s (80% of an update) | fast, 1.00 ms | 0.50x; slow **2.00x** | torch.compile of it: left out |"
    assert row in readme.read_text()
    for name, ratio in (("slow", 2.0), ("fast", None), ("torch.compile of it", None), (None, None)):
        assert modules.report.also({**work, "also": name}) == ratio


def test_the_readme_is_written_between_its_markers_and_again(results):
    readme = results / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    for _ in range(2):
        done = report(results, "--readme", readme)
        assert done.returncode == 0, done.stderr
        text = readme.read_text()
        assert text.startswith("before\n<!-- benchmarks -->\n**NVIDIA X1** (driver 1.2")
        assert text.endswith("</details>\n<!-- /benchmarks -->\nafter\n")
        assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| gather") or line.startswith("| loss")]
    assert rows == [
        "| gather | rows <of> a clip, bf16, exact | 2.00 ms (reference) | 1000 GB/s (50%) | fast, 1.00 ms | 0.50x "
        "| slow 2.00x, torch.compile of it: left out | triton 2.00x |",
        "| loss | n, fp32 | failed: vjepa (cpu) | | | | | |",
    ]
    assert "![NVIDIA X1: time of the best peer over ours](nvidia-x1.svg)" in text


def test_the_plot_has_every_ratio(results):
    readme = results / "README.md"
    readme.write_text("<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    assert report(results, "--readme", readme).returncode == 0
    root = ET.parse(results / "nvidia-x1.svg").getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "gather: rows <of> a clip, bf16, exact" in texts
    assert "gather: rows <of> a clip, bf16, exact [triton]" in texts
    assert texts.count("0.50x") == texts.count("2.00x") == 1


def test_a_readme_without_markers_is_refused(results):
    readme = results / "README.md"
    readme.write_text("no markers\n")
    done = report(results, "--readme", readme)
    assert done.returncode != 0
    assert "must have one <!-- benchmarks -->" in done.stderr
    assert readme.read_text() == "no markers\n"


def test_the_readme_of_this_project_has_the_markers(modules):
    text = (ROOT / "README.md").read_text()
    assert modules.report.insert(text, "x").count("\nx\n") == 1


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.0, "2000 ms"), (1.234e-3, "1.23 ms"), (45.6e-6, "45.6 µs"), (4e-7, "0.40 µs")]
)
def test_durations(modules, seconds, words):
    assert modules.report.duration(seconds) == words


def measured(names_and_seconds, **more):
    rows = [{"backend": name, "median": seconds} for name, seconds in names_and_seconds.items()]
    work = {"name": "predictor, forward + backward", "dtype": "bfloat16", "shapes": {"qkv": [90, 3, 16, 24]}}
    work["shapes"]["lengths"] = [40, 50]
    return {**work, "results": rows, **more}


def test_the_table_of_attention_is_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    choose = importlib.import_module("benchmarks.choose_attention")
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(choose.RESULTS)], cwd=ROOT, check=False)
    if changed.returncode == 0:  # no results of one's own, and a checkout
        assert choose.table(choose.RESULTS) == choose.TABLE.read_text()

    works = [
        measured({"auto": 1.0, "sdpa": 1.0, "triton": 0.5, "reference": 9.0, None: 0.1}),
        measured({"sdpa": 0.1, "triton": 0.5}, name="predictor, forward"),
        measured({"sdpa": 0.1}, shapes={"qkv": [90, 3, 16, 64], "lengths": [45, 45]}),
        measured({}, dtype="float32"),
    ]
    amx = {"kind": "cpu", "capability": "amx"}
    for slug, about in (("h200", {"kind": "cuda", "capability": "9.0"}), ("cpu", {"kind": "cpu"}), ("cpu-amx", amx)):
        (tmp_path / f"attention-{slug}.json").write_text(json.dumps({"machine": about, "works": works}))
    namespace: dict = {}
    exec(choose.table(tmp_path), namespace)
    entries = [
        ("bfloat16", 24, 45, False, ("triton", "sdpa", "reference")),
        ("bfloat16", 64, 45, True, ("sdpa",)),
    ]
    assert namespace["MEASURED"] == {"cpu": entries, "cpu_amx": entries, "sm_90": entries}
