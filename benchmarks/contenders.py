"""Who takes part in bench_step, how each is made anew, checked and charged for its memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from vjepa.kernels import _dispatch

from .assembled import Assembled
from .clocks import Call
from .flops import model_flop
from .harness import COMPILED, Contender, Work, Wrong, dtype_name, peak_memory
from .memory import host_peak
from .ours import Ours
from .released import Released
from .steps import Step, Workload, loss_of, nbytes
from .straight import Straight

STRAIGHT, ASSEMBLED, RELEASED = "straight PyTorch", "assembled best parts", "released code"
COMPILED_STRAIGHT = f"{COMPILED} of straight PyTorch"
NAMED_ON_GPU = ("triton", "cuda")
FLOAT32 = 5e-6  # between losses of two who sum in another order, as between ours and the released trainer's
BFLOAT16 = 2.0**-8  # relative: one step of a bfloat16, as which the released code holds the loss on a CPU


class Runner:
    """A contender that is made when it is first needed, and again from the same weights when it is to be checked."""

    def __init__(self, make: Callable[[], Step]) -> None:
        self.make = make
        self.made: Step | None = None
        self.call: Call | None = None
        self.part: str | None = None
        self.grown: int | None = None

    def restart(self, part: str | None = None) -> None:
        """Begins anew; from now on a call is a full step, or `part` of one."""
        self.free()
        self.part = part
        self.made = self.make()
        self.call = self.made.step if part is None else self.made.parts()[part]

    def free(self) -> None:
        self.made = self.call = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __call__(self) -> Any:
        if self.call is None:  # freed since it was checked, because somebody it is shared with did not fit
            self.restart(self.part)
        return self.call()

    def first(self) -> Any:
        """The first call after a restart. On a CPU it is charged for its memory; who does not fit into a GPU's is freed."""
        found: list[Any] = []
        try:
            self.restart(self.part)
            if torch.cuda.is_initialized():
                return self()
            self.grown = host_peak(lambda: found.append(self()))
            return found[0]
        except torch.OutOfMemoryError:
            self.free()
            raise

    def memory(self) -> int | None:
        """Bytes: what one step adds, and what stays between steps."""
        if torch.cuda.is_initialized():
            self.grown = peak_memory(self)
        return None if self.grown is None else self.grown + nbytes(self.made.state())


def contenders(
    work: Workload, reference_repo: str | None, peers: bool = True, compiles: bool = False
) -> list[Contender]:
    """Ours under auto, and on a GPU by name; then the peers, if asked for with the compiled one among them."""
    mine = Runner(lambda: Ours(work))
    found = [Contender(f"vjepa ({name})", mine, name, memory=mine.memory) for name in ("auto", *named(work.device))]
    if not peers:
        return found
    makers: dict[str, Callable[[], Step]] = {STRAIGHT: lambda: Straight(work), ASSEMBLED: lambda: Assembled(work)}
    if compiles:
        makers[COMPILED_STRAIGHT] = lambda: Straight(work, compile_layers=True)
    if reference_repo is not None:
        makers[RELEASED] = lambda: Released(work, reference_repo)
    runners = {name: Runner(make) for name, make in makers.items()}
    return found + [Contender(name, runner, memory=runner.memory) for name, runner in runners.items()]


def named(device: torch.device) -> list[str]:
    """Backends of ours that serve some operator of a step on a GPU, where auto may not take them yet."""
    if device.type != "cuda":
        return []
    rows = [_dispatch.explain(op, device) for op in _dispatch.operators()]
    return [name for name in NAMED_ON_GPU if any(row.get(name) in _dispatch.RUNS for row in rows)]


def verifier(work: Workload, steps: int = 1) -> Callable[[Call, float], None]:
    """verify(call, factor): the losses of the first steps of `call`, begun anew, against straight PyTorch's in float32.

    In float32 they may differ by FLOAT32. In bfloat16 by BFLOAT16 of the loss: it is a mean over so many numbers that their
    own roundings cancel, but it may be held in bfloat16 itself.
    """
    expected = expected_losses(work, steps)
    allowed = [FLOAT32 if work.dtype == torch.float32 else BFLOAT16 * loss for loss in expected]

    def verify(call: Call, factor: float) -> None:
        assert isinstance(call, Runner)
        losses = [loss_of(call.first()), *(loss_of(call()) for _ in range(steps - 1))]
        for number, (loss, exact, limit) in enumerate(zip(losses, expected, allowed, strict=True)):
            if not abs(loss - exact) <= limit:
                raise Wrong(f"loss of step {number} is {loss:.7g}, expected {exact:.7g} within {limit:.2g}")

    return verify


def expected_losses(work: Workload, steps: int) -> list[float]:
    """Of straight PyTorch in float32; for one step without the backward pass."""
    plain = Straight(work.in_float32())
    if steps > 1:
        return [loss_of(plain.step()) for _ in range(steps)]
    with torch.no_grad():
        return [loss_of(plain.forward())]


def work_of(
    work: Workload, name: str, fewest_rounds: int, part: str | None = None, op: str = "step", **about: Any
) -> Work:
    """The entry in the results: model FLOP of the step, or of one part of it."""
    config, masks = work.config, work.masks
    sets = (list(masks.context.lengths), list(masks.target.lengths))
    return Work(
        op,
        name,
        dtype_name(work.dtype),
        {"video": list(work.video.shape), "context": sets[0], "target": sets[1]},
        work.packing,
        flop=model_flop(config, work.clips, *sets, part=part),
        clips=work.clips if part is None else 0,
        about={"model": work.preset, "part": part, "config": config.to_dict(), **about},
        fewest_rounds=fewest_rounds,
    )
