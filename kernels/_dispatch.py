"""Which backend serves an operator: one table, one log line for each choice.

An op file adds its rows with :func:`register`; an operator asks :func:`choose` each time it runs, so that a choice
also holds inside code compiled earlier. ``VJEPA_KERNELS`` or :func:`backend` force a backend on every op that has it
and leave the others on auto. ``auto`` takes the first automatic row that can run, in the order of ``PREFERENCE``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LOG = logging.getLogger("vjepa.kernels")
VARIABLE = "VJEPA_KERNELS"
PREFERENCE = ("cuda", "triton", "cpu", "flash_attn", "xformers", "sdpa", "reference")
# Names that have no row in this release: what is missing and what to use instead.
ABSENT = {
    "flash_attn": "this release has no FlashAttention backend; use sdpa, which calls the flash kernels of torch",
    "xformers": "this release has no xformers backend; use sdpa, which calls the memory-efficient kernels of torch",
}


def _no_backward(*arguments: Any) -> None:
    raise NotImplementedError("an operator that updates in place has no backward pass")


@dataclass(frozen=True)
class Row:
    """One way to serve an op: `forward`, and `backward` if it has one.

    `why_not(device)` is None where it can run, or the reason; `unfit(*arguments)` is None or why it cannot take these
    arguments. On a device for which it is not `automatic` (or on any), a row runs only when asked for by name.
    """

    op: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] = _no_backward
    why_not: Callable[[torch.device], str | None] = lambda device: None
    unfit: Callable[..., str | None] = lambda *arguments: None
    automatic: Callable[[torch.device], bool] | bool = True

    def unasked(self, device: torch.device) -> bool:
        """Whether this row may be taken on `device` without being asked for."""
        return self.automatic if isinstance(self.automatic, bool) else self.automatic(device)

    def obstacle(self, device: torch.device, *arguments: Any) -> str | None:
        """Why this row cannot serve a call on `device`, with these arguments if they are given, or None."""
        return self.why_not(device) or (self.unfit(*arguments) if arguments else None)


_TABLE: dict[str, dict[str, Row]] = {}  # rows of an op in the order of PREFERENCE
_forced: dict[object, str] = {}  # by block, innermost last; process-wide: autograd runs backward in threads of its own
_logged: set[tuple[str, str, str]] = set()


def register(row: Row) -> None:
    """Add a row to the table."""
    rows = {**_TABLE.get(row.op, {}), row.name: row}
    _TABLE[row.op] = {name: rows[name] for name in PREFERENCE if name in rows}


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator torch.ops.vjepa.<name>: what runs on every device, and what runs on fake tensors.

    Under torch.autocast an operator computes in the dtypes it is given, as it says, not in those of autocast.
    """

    @functools.wraps(run)
    def run_without_autocast(*arguments: Any) -> Any:
        active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not active:
            return run(*arguments)
        with ExitStack() as stack:
            for kind in active:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return run(*arguments)

    torch.library.define(f"vjepa::{name}", schema)
    torch.library.impl(f"vjepa::{name}", "default", run_without_autocast)
    torch.library.register_fake(f"vjepa::{name}", fake)


def requested() -> str:
    """The backend asked for: the innermost `backend()` or else the environment variable, by default auto."""
    forced = next(reversed(_forced.values()), None)
    if forced is not None:
        return forced
    name = os.environ.get(VARIABLE)
    if not name:
        return "auto"
    _check_name(name, f"the environment variable {VARIABLE}")
    return name


def choose(op: str, device: torch.device, *arguments: Any) -> Row:
    """:func:`select`, with a log line the first time a row serves an op on a kind of device."""
    row = select(op, device, *arguments)
    key = (op, device.type, row.name)
    if key not in _logged:
        _logged.add(key)
        LOG.info("%s on %s: %s (%s=%s)", op, device.type, row.name, VARIABLE, requested())
    return row


def select(op: str, device: torch.device, *arguments: Any) -> Row:
    """The row that serves `op` on `device`, for these arguments if they are given.

    Raises:
        RuntimeError: with the reason, if the backend asked for cannot.
    """
    rows = _TABLE[op]
    name = requested()
    if name in rows:
        obstacle = rows[name].obstacle(device, *arguments)
        if obstacle is not None:
            raise RuntimeError(f"the backend {name} cannot serve {op} on {device}: {obstacle}")
        return rows[name]
    _check_exists(name)
    for row in rows.values():
        if row.unasked(device) and row.obstacle(device, *arguments) is None:
            return row
    raise RuntimeError(f"no backend can serve {op} on {device}")


def explain(op: str, device: torch.device) -> dict[str, str]:
    """Each backend that `op` has, in order of preference, and whether it can run on `device` or why not."""
    return {
        name: row.why_not(device) or ("can run" if row.unasked(device) else "runs if asked for")
        for name, row in _TABLE[op].items()
    }


def absent() -> dict[str, str]:
    """Each backend that no op has in this build, and why."""
    return {name: reason for name, reason in ABSENT.items() if not _anywhere(name)}


def operators() -> list[str]:
    """Names of the ops in the table."""
    return sorted(_TABLE)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend on every op that has it, inside a `with` block; the other ops stay on auto.

    Args:
        name: auto, triton, cuda, cpu, reference, sdpa, flash_attn or xformers. The choice holds for the whole process,
            also for backward passes run meanwhile. Use it around compiled functions, not inside.

    Raises:
        ValueError: unknown name.
        RuntimeError: no op has this backend in this build. An op raises it too, with the reason, when its own backend
            of this name cannot run on the device of its tensors.
    """
    _check_name(name, "backend name")
    _check_exists(name)
    block = object()  # blocks of several threads need not end in the order in which they began
    _forced[block] = name
    try:
        yield
    finally:
        del _forced[block]


def _check_name(name: str, what: str) -> None:
    if name != "auto" and name not in PREFERENCE:
        raise ValueError(f"{what} must be one of auto, {', '.join(PREFERENCE)}, got {name!r}")


def _anywhere(name: str) -> bool:
    return any(name in rows for rows in _TABLE.values())


def _check_exists(name: str) -> None:
    if name != "auto" and not _anywhere(name):
        raise RuntimeError(f"the backend {name} cannot run here: {ABSENT[name]}")
