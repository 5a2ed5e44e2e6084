"""`vjepa` itself: help, version, unknown commands, exit codes, and errors as one sentence."""

import re
import subprocess
import sys

import pytest

from vjepa import cli
from vjepa.cli import COMMANDS, CommandError, UsageError, main


def test_help_lists_the_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +\w", out, re.M) for name in ("pretrain", "masks", "doctor"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"vjepa \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_needs_neither_torch_nor_a_parser():
    loaded = "print(sorted({'torch', 'jsonargparse', 'av', 'yaml'} & {*sys.modules}))"
    code = f"import sys; from vjepa.cli import main; main(['--help']); {loaded}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command():
    result = subprocess.run([sys.executable, "-m", "vjepa", "pretrian"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "vjepa: error: unknown command 'pretrian'; did you mean 'pretrain'?\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["docter"], "unknown command 'docter'; did you mean 'doctor'?"),
        (["zzz"], "unknown command 'zzz'; expected one of pretrain, masks, bench, doctor"),
        (["--config", "x.yaml"], "unknown option '--config'; expected a command first"),
    ],
)
def test_an_unknown_command_is_an_error(argv, sentence, capsys):
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "masks"])
def test_each_option_is_explained_with_type_and_default(command, capsys):
    """Every dotted option: some words, a type, and a default or that it is required."""
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    entries = re.findall(r"^  (--[a-z]+\.[a-z_.]+)\b(.*?)(?=^  --|^\S|\Z)", out, re.M | re.S)
    options = {name: " ".join(text.split()) for name, text in entries if not name.endswith(".help")}
    assert {"--data.path", "--train.lr", "--run.dir", "--model.preset", "--masks.packing"} <= options.keys()
    for name, text in options.items():
        words, _, facts = text.rpartition("(")
        assert len(re.findall(r"[a-z]{2,}", words)) >= 2, f"{name} has no words: {text}"
        assert "type: " in facts or "type: " in text, f"{name} has no type: {text}"
        assert "default: " in text or "required" in text, f"{name} has no default: {text}"


def test_doctor_help(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "Exit code" in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch):
    """Makes `vjepa doctor` raise the given error."""

    def install(error: BaseException):
        def run(argv):
            raise error

        monkeypatch.setattr("vjepa.doctor.main", run)

    return install


class OwnError(RuntimeError):
    """An error type of the product, as DataError, RunError or CheckpointError are."""


OwnError.__module__ = "vjepa.somewhere"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("unknown key 'a'"), 2, "unknown key 'a'"),
        (CommandError("no clip"), 1, "no clip"),
        (OwnError("two\n  lines"), 1, "two lines"),
        (ValueError("lr must be positive"), 1, "lr must be positive"),
        (PermissionError(13, "Permission denied", "/x"), 1, "[Errno 13] Permission denied: '/x'"),
        (
            ModuleNotFoundError("No module named 'av.x'", name="av.x"),
            1,
            "needs the package 'av', which is not installed",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors_are_one_sentence(error, code, sentence, failing, capsys):
    failing(error)
    assert main(["doctor"]) == code
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("vjepa doctor: error: ")
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback_too(failing, capsys):
    failing(ValueError("lr must be positive"))
    assert main(["doctor", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "vjepa doctor: error: lr must be positive"


def test_out_of_memory_says_what_to_do():
    import torch

    sentence, code = cli.explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert code == 1 and "--train.accumulation_steps" in sentence


@pytest.mark.parametrize("bug", [TypeError("a bug"), ModuleNotFoundError("No module named 'vjepa.x'", name="vjepa.x")])
def test_a_bug_keeps_its_traceback(bug, failing):
    failing(bug)
    with pytest.raises(type(bug)):
        main(["doctor"])


def test_every_command_has_a_module_and_a_summary():
    assert all(summary and module.startswith("vjepa.") for module, summary in COMMANDS.values())
