"""`vjepa bench` finds the suite, names what is missing, and hands `data` on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vjepa import cli_bench
from vjepa.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def commands(monkeypatch):
    """What would have been run, and with which exit code it ends."""
    run = SimpleNamespace(found=[], code=0)

    def stand_in(command, cwd, check):
        run.found.append((command, cwd))
        return SimpleNamespace(returncode=run.code)

    monkeypatch.setattr(cli_bench.subprocess, "run", stand_in)
    monkeypatch.setattr(cli_bench, "suite", lambda: ROOT / "benchmarks")
    return run


def test_the_suite_runs_in_its_checkout_and_writes_to_the_folder(commands, tmp_path, capsys):
    assert main(["bench", "ema", "step", "ema", "--out", str(tmp_path), "--reference-repo", str(tmp_path / "x")]) == 0
    ((command, folder),) = commands.found
    assert folder == ROOT
    assert command[:3] == [sys.executable, "-m", "pytest"]
    assert command[command.index("--results") + 1] == str(tmp_path)
    assert command[command.index("--reference-repo") + 1] == str(tmp_path / "x")
    files = [argument for argument in command if argument.endswith(".py")]
    assert files == [str(ROOT / "benchmarks" / f"bench_{name}.py") for name in ("ema", "step")]
    assert f"results are in {tmp_path}" in capsys.readouterr().out


def test_without_names_all_benchmarks_run_and_a_failure_is_passed_on(commands):
    commands.code = 1
    assert main(["bench"]) == 1
    ((command, _),) = commands.found
    assert command[-1] == str(ROOT / "benchmarks")
    assert "--reference-repo" not in command


def test_the_options_are_those_that_pytest_knows(commands, tmp_path, monkeypatch):
    """The real command, asked only to list what it would run."""
    assert main(["bench", "gradient_norm", "--out", str(tmp_path)]) == 0
    ((command, folder),) = commands.found
    monkeypatch.undo()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = cli_bench.subprocess.run(
        [*command, "--collect-only"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_gradient_norm.py::bench_gradient_norm" in done.stdout


def test_an_unknown_benchmark_is_named_with_those_there_are(commands, capsys):
    assert main(["bench", "stpe"]) == 2
    assert "there is no benchmark 'stpe'; expected data, attention, block" in capsys.readouterr().err
    assert not commands.found


def test_without_the_checkout_a_sentence_says_what_is_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli_bench, "__file__", str(tmp_path / "site-packages" / "vjepa" / "cli_bench.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 1
    assert "the folder 'benchmarks' of the source checkout is needed" in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    assert cli_bench.suite() == ROOT / "benchmarks"  # that of the current directory


def test_without_pytest_benchmark_a_sentence_says_how_to_get_it(commands, monkeypatch, capsys):
    find = cli_bench.importlib.util.find_spec
    monkeypatch.setattr(
        cli_bench.importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else find(name)
    )
    assert main(["bench", "ema"]) == 1
    assert "the benchmarks need pytest_benchmark, which is not installed; get it with: pip" in capsys.readouterr().err
    assert not commands.found


def test_data_is_handed_on(monkeypatch):
    module, given = ModuleType("vjepa.cli_bench_data"), []
    module.main = lambda argv: given.append(list(argv)) or 7
    monkeypatch.setitem(sys.modules, "vjepa.cli_bench_data", module)
    assert main(["bench", "data", "clips", "--workers", "2"]) == 7
    assert given == [["clips", "--workers", "2"]]
