"""The numbers of a step, some of which the device may still be computing."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

Check = Callable[[dict[str, float]], None]


class StepNumbers(dict[str, float]):
    """loss, schedules, norms and monitors of a step, a dict of floats in the order in which they are reported.

    Those that the device computes travel to the host while it goes on; whoever first reads one waits until they are there.
    `check` is then called with them, once, and raises if the step was refused.
    """

    def __init__(self, known: dict[str, float], device: dict[str, torch.Tensor], check: Check) -> None:
        names = ["loss", *known, *(name for name in device if name != "loss")]
        super().__init__({name: known.get(name, math.nan) for name in names})
        self._known, self._awaited = known, list(device)
        self._check: Check | None = check
        values = torch.stack([value.detach().float() for value in device.values()])
        self._arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values
        self._refused: Exception | None = None

    def settle(self) -> None:
        """Waits for the numbers, and raises what `check` raises; does nothing the second time."""
        check, self._check = self._check, None  # which holds the batch
        if check is not None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self.update(zip(self._awaited, self._values.tolist(), strict=True))
            try:
                check({name: super(StepNumbers, self).__getitem__(name) for name in self._awaited})
            except Exception as error:
                self._refused = error
        if self._refused is not None:
            raise self._refused

    def __getitem__(self, name: str) -> float:
        if name not in self._known:
            self.settle()
        return super().__getitem__(name)

    # whatever else reads values; iterating alone does not, but tells dict(), ** and json to go by these methods
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is what get means

    def values(self) -> Any:
        self.settle()
        return super().values()

    def items(self) -> Any:
        self.settle()
        return super().items()

    def pop(self, *arguments: Any) -> Any:
        self.settle()
        return super().pop(*arguments)

    def copy(self) -> dict[str, float]:
        return dict(self)

    def __eq__(self, other: object) -> bool:
        self.settle()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self.items()),)  # which torch.load takes

    def __repr__(self) -> str:
        self.settle()
        return super().__repr__()
