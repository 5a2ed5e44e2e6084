"""`vjepa bench`: hands `vjepa bench data ...` to its command."""

from __future__ import annotations

from collections.abc import Sequence

from vjepa.cli import UsageError


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; returns the exit code."""
    if list(argv[:1]) != ["data"]:
        raise UsageError(f"expected `data`, got {' '.join(argv[:1]) or 'nothing'}")
    from vjepa.cli_bench_data import main as bench_data

    return bench_data(argv[1:])
