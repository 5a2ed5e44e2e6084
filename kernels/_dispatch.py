"""Which backend serves an operator: one table, one log line for each choice.

An op file adds its rows with :func:`register`; an operator asks :func:`choose` each time it runs, so that a choice
also holds inside code compiled earlier. ``VJEPA_KERNELS`` or :func:`backend` force a backend on every op that has it
and leave the others on auto. ``auto`` takes the first row that can run: of those that were measured for such arguments,
the fastest first (:func:`prefer`), then of the automatic ones in the order of ``PREFERENCE``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LOG = logging.getLogger("vjepa.kernels")
VARIABLE = "VJEPA_KERNELS"
PREFERENCE = (
    "cuda",
    "triton",
    "cpu",
    "flash_attn_4",
    "flash_attn_3",
    "flash_attn_2",
    "torch_varlen",
    "xformers",
    "sdpa",
    "reference",
)
GROUPS = {"flash_attn": ("flash_attn_4", "flash_attn_3", "flash_attn_2")}  # a name for the newest that can run
NAMES = (*PREFERENCE, *GROUPS)
RUNS = ("can run", "runs if asked for")


def _no_backward(*arguments: Any) -> None:
    raise NotImplementedError("an operator that updates in place has no backward pass")


def _updates(*arguments: Any) -> None:
    raise NotImplementedError("an operator that updates in place is prepared first")


def _is_called(*arguments: Any) -> None:
    raise NotImplementedError("an operator that returns something is called at once")


@dataclass(frozen=True)
class Row:
    """One way to serve an op: `forward`, and `backward` if it has one.

    An op that updates lists of tensors in place has `prepare(*lists)` instead, which checks what only the row can see
    and returns what then does the work, once or often, as long as the tensors stay what they are.
    `why_not(device)` is None where it can run, or the reason; `unfit(*arguments)` is None or why it cannot take these
    arguments. On a device for which it is not `automatic` (or on any), a row runs only when asked for by name.
    """

    op: str
    name: str
    forward: Callable[..., Any] = _updates
    backward: Callable[..., Any] = _no_backward
    why_not: Callable[[torch.device], str | None] = lambda device: None
    unfit: Callable[..., str | None] = lambda *arguments: None
    automatic: Callable[[torch.device], bool] | bool = True
    prepare: Callable[..., Any] = _is_called

    def unasked(self, device: torch.device) -> bool:
        """Whether this row may be taken on `device` without being asked for."""
        return self.automatic if isinstance(self.automatic, bool) else self.automatic(device)

    def obstacle(self, device: torch.device, *arguments: Any) -> str | None:
        """Why this row cannot serve a call on `device`, with these arguments if they are given, or None."""
        return self.why_not(device) or (self.unfit(*arguments) if arguments else None)


_TABLE: dict[str, dict[str, Row]] = {}  # rows of an op in the order of PREFERENCE
_measured: dict[str, Callable[..., Sequence[str]]] = {}
_forced: dict[object, str] = {}  # by block, innermost last; process-wide: autograd runs backward in threads of its own
_logged: set[tuple[str, str, str]] = set()


def register(row: Row) -> None:
    """Add a row to the table."""
    rows = {**_TABLE.get(row.op, {}), row.name: row}
    _TABLE[row.op] = {name: rows[name] for name in PREFERENCE if name in rows}


def prefer(op: str, order: Callable[..., Sequence[str]]) -> None:
    """Let auto try the rows that `order(device, *arguments)` names, in that order, before the automatic ones."""
    _measured[op] = order


def without_autocast(run: Callable[..., Any], *arguments: Any) -> Any:
    """run(*arguments) outside of autocast."""
    active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not active:
        return run(*arguments)
    with ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return run(*arguments)


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator torch.ops.vjepa.<name>: what runs on every device, and what runs on fake tensors.

    Under torch.autocast an operator computes in the dtypes it is given, as it says, not in those of autocast.
    """

    @functools.wraps(run)
    def run_without_autocast(*arguments: Any) -> Any:
        return without_autocast(run, *arguments)

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
    asked = [rows[known] for known in GROUPS.get(name, (name,)) if known in rows]
    if asked:
        obstacles = [row.obstacle(device, *arguments) for row in asked]
        if None in obstacles:
            return asked[obstacles.index(None)]
        reasons = {
            why: [row.name for row, its in zip(asked, obstacles, strict=True) if its == why] for why in obstacles
        }
        why = "; ".join(f"{why} ({', '.join(names)})" for why, names in reasons.items())
        raise RuntimeError(
            f"the backend {name} cannot serve {op} on {device}: {why if name in GROUPS else obstacles[0]}"
        )
    order = _measured[op](device, *arguments) if arguments and op in _measured else ()
    automatic = (row for row in rows.values() if row.unasked(device))
    for row in (*(rows[known] for known in order if known in rows), *automatic):
        if row.obstacle(device, *arguments) is None:
            return row
    raise RuntimeError(f"no backend can serve {op} on {device}")


def explain(op: str, device: torch.device) -> dict[str, str]:
    """Each backend that `op` has, in order of preference, and whether it can run on `device` or why not."""
    return {name: row.why_not(device) or RUNS[not row.unasked(device)] for name, row in _TABLE[op].items()}


def operators() -> list[str]:
    """Names of the ops in the table."""
    return sorted(_TABLE)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend on every op that has it, inside a `with` block; the other ops stay on auto.

    Args:
        name: auto, triton, cuda, cpu or reference; for attention also sdpa, torch_varlen, xformers, flash_attn_2,
            flash_attn_3, flash_attn_4, or flash_attn for the newest of these that can run. The choice holds for the
            whole process, also for backward passes run meanwhile. Use it around compiled functions, not inside, and
            around forward and backward pass alike: sdpa leaves nothing that another's backward pass could use.

    Raises:
        ValueError: unknown name. An op raises RuntimeError, with the reason, when its own backend of this name is not
            installed or cannot take its tensors.
    """
    _check_name(name, "backend name")
    block = object()  # blocks of several threads need not end in the order in which they began
    _forced[block] = name
    try:
        yield
    finally:
        del _forced[block]


def _check_name(name: str, what: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{what} must be one of auto, {', '.join(NAMES)}, got {name!r}")
