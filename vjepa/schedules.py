"""Learning rate, weight decay and EMA momentum of a pretraining step, as pure functions of its number.

Every schedule is stretched to ``scale`` times the training length and cut off where training ends.
With ``n = k + 1`` for step ``k`` (from 0), ``S = scale * total_steps`` and ``W = warmup_steps``:

    lr(n)  = start_lr + (lr - start_lr) n / W                                     while n < W
           = final_lr + (lr - final_lr) (1 + cos(pi (n - W) / (int(S) - W))) / 2  afterwards
    wd(n)  = final_wd + (wd - final_wd) (1 + cos(pi n / int(S))) / 2
    m(k)   = m0 + (m1 - m0) k / S

After step ``S`` each one stays at its final value.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class StepValues(NamedTuple):
    """What one step uses: learning rate, weight decay of the decayed parameters, EMA momentum."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class Schedules:
    """The three schedules of a run (V-JEPA's recipe by default).

    Args:
        total_steps: optimizer steps of the whole run (at least 1).
        warmup_steps: steps of linear warm-up, 0 to ``total_steps``; step ``warmup_steps - 1`` has exactly the peak.
        scale: length of the schedules over the length of training (at least 1).
        start_lr, lr, final_lr: learning rate at the start, at the peak and at the stretched end.
        weight_decay, final_weight_decay: decoupled weight decay at the start and at the stretched end.
        momentum: EMA momentum at step 0 and at the stretched end, each within [0, 1].

    Raises:
        TypeError: naming the argument that is not a number.
        ValueError: naming the argument that is out of range.
    """

    total_steps: int
    warmup_steps: int
    scale: float = 1.25
    start_lr: float = 2e-4
    lr: float = 6.25e-4
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: tuple[float, float] = (0.998, 1.0)

    def __post_init__(self) -> None:
        for name in ("total_steps", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name in ("scale", "start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay"):
            if not _is_number(getattr(self, name)):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.momentum, tuple | list) or not all(map(_is_number, self.momentum)):
            raise TypeError(f"momentum must be two numbers (start, end), got {self.momentum!r}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"warmup_steps must be within 0..total_steps={self.total_steps}, got {self.warmup_steps}")
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise ValueError(f"scale must be a finite number of at least 1, got {self.scale}")
        for name in ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if len(self.momentum) != 2 or not all(0 <= m <= 1 for m in self.momentum):
            raise ValueError(f"momentum must be two numbers within 0..1 (start, end), got {self.momentum}")

    def at(self, k: int) -> StepValues:
        """``(lr, weight_decay, momentum)`` of step ``k``, from 0 (``ValueError`` for a negative one)."""
        if not isinstance(k, int):
            raise TypeError(f"k must be an int, got {k!r}")
        if k < 0:
            raise ValueError(f"k must be a step number counted from 0, got {k}")
        return StepValues(self._lr(k + 1), self._weight_decay(k + 1), self._momentum(k))

    def _lr(self, n: int) -> float:
        if n < self.warmup_steps:
            return self.start_lr + n / self.warmup_steps * (self.lr - self.start_lr)
        # The longest warm-up (all of an unstretched run) leaves no cosine part: the divisor stays 1.
        length = max(1, int(self.scale * self.total_steps) - self.warmup_steps)
        return _cosine(self.lr, self.final_lr, (n - self.warmup_steps) / length)

    def _weight_decay(self, n: int) -> float:
        return _cosine(self.weight_decay, self.final_weight_decay, n / int(self.scale * self.total_steps))

    def _momentum(self, k: int) -> float:
        start, end = self.momentum
        return start + (end - start) * min(1.0, k / (self.scale * self.total_steps))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` (progress 0) to ``end`` (progress 1 and later)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
