"""The command line `vjepa`: finds the subcommand, runs it, and turns expected errors into one sentence and an exit
code.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong option, key or value. `--debug` shows the
traceback as well. Subcommands are imported only when they run, so that `vjepa --help` and `vjepa doctor` need no
package but torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence

COMMANDS = {
    "pretrain": ("vjepa.cli_pretrain", "pretrain a V-JEPA on a folder, a list or a weighted mix of videos"),
    "masks": ("vjepa.cli_masks", "draw the masks of a configuration over a real clip, as a PNG"),
    "bench": ("vjepa.cli_bench", "run the benchmarks on this machine, each beside its best peers, and print the table"),
    "doctor": ("vjepa.doctor", "versions, devices, native library, decoders; what is missing and how to get it"),
}
OK, FAILED, WRONG_USAGE = 0, 1, 2


class UsageError(Exception):
    """A wrong option, configuration key or value; its text is one sentence for the user."""


class CommandError(Exception):
    """An expected failure of a command; its text is one sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vjepa` with `argv` (by default the process's arguments) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return OK
    if arguments[0] == "--version":
        from vjepa import __version__

        print(f"vjepa {__version__}")
        return OK
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail("vjepa", unknown_command(name), WRONG_USAGE)
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except SystemExit as stop:  # argparse ends --help and --print_config this way
        return OK if stop.code is None else int(stop.code)
    except KeyboardInterrupt:
        return _fail(f"vjepa {name}", "interrupted.", 130)
    except Exception as error:
        found = explain(error)
        if found is None:
            raise
        if "--debug" in rest:
            traceback.print_exc()
        return _fail(f"vjepa {name}", *found)


def explain(error: Exception) -> tuple[str, int] | None:
    """The sentence and exit code for an expected error; None for one that is a bug and deserves its traceback."""
    if isinstance(error, UsageError):
        return str(error), WRONG_USAGE
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing == "vjepa":
            return None
        need = f"this command needs the package {missing!r}, which is not installed"
        return f"{need}; get it with: pip install 'vjepa[train]'", FAILED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named here so that --help and doctor do not import torch
        advice = (
            "raise --train.accumulation_steps, set --train.activation_checkpointing true, or lower --train.batch_size"
        )
        return f"the device is out of memory: {advice}.", FAILED
    own = type(error).__module__.partition(".")[0] == "vjepa"
    if own or isinstance(error, (CommandError, ValueError, OSError)):
        return _one_sentence(error), FAILED
    return None


def help_text() -> str:
    """What `vjepa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vjepa <command> [options]",
            "",
            "Latent video prediction: learn video features from unlabelled video.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this help",
            "  --version   show the version",
            "",
            "vjepa <command> --help shows a command's options with type, unit and default.",
        ]
    )


def unknown_command(name: str) -> str:
    """The sentence for a command that does not exist."""
    if name.startswith("-"):
        return f"unknown option {name!r}; expected a command first: {', '.join(COMMANDS)}"
    nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


def _one_sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return code
