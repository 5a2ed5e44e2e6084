"""AdamW with moving average and copies in the native library: a table from lists of tensors, once, and steps by it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ._adamw import Lists, Numbers, check_adamw_apart
from ._native import (
    DTYPE_CODES,
    NO_COPY,
    STATUS_OVERLAP,
    AdamWEntry,
    AdamWGroup,
    AdamWScalars,
    addresses,
    check,
    codes_of,
    library,
    table_of,
    words_of,
)
from ._native_launch import DeviceTable

CHUNK_ELEMENTS = 1 << 14  # per CUDA block: 0.65 MB of traffic, a thousand blocks for the smallest ViT
MAXIMUM_GROUPS = 32  # VJEPA_MAXIMUM_GROUPS of csrc/capi.h
COLUMNS = [field[0] for field in AdamWEntry._fields_]


def words(lists: Lists) -> array[int]:
    """The rows of the table, in one group, without gradients and steps."""
    none = [0] * len(lists.params)

    def optional(tensors: Sequence[Tensor]) -> Iterable[int]:
        return addresses(tensors) if tensors else none

    return words_of(
        len(none),
        addresses(lists.params),
        none,
        addresses(lists.exp_avgs),
        addresses(lists.exp_avg_sqs),
        optional(lists.shadows),
        optional(lists.param_copies),
        optional(lists.shadow_copies),
        none,
        map(Tensor.numel, lists.params),
        none,
        [DTYPE_CODES[copy.dtype] if copy.numel() else NO_COPY for copy in lists.param_copies]
        or [NO_COPY] * len(lists.params),
        none,
    )


def check_memory(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise if a tensor of some elements has none: to the library it would be one that its parameter lacks."""
    for name, tensors in lists.items():
        for number, address in enumerate(addresses(tensors)):
            if not address and tensors[number].numel():
                raise ValueError(f"{name}[{number}] must have memory for its elements, got a storage that was freed")


class Step:
    """Steps on lists of float32 tensors of one device, which stay as they are; gradients may come and go.

    `load(grads)` and then `run(numbers)`. All lists are checked and walkable; gradients float32, bfloat16 or float16.
    Raises ValueError, at first or in `load`, on tensors without memory or that share it with one that is written,
    NativeError in `run` on numbers out of range; nothing is written then.
    """

    def __init__(self, lists: Lists) -> None:
        check_memory(lists._asdict())
        self.lists = lists._replace(grads=[])  # which others may want to free
        self.words = words(lists)
        self._set: dict[str, list[int]] = {}

    def set_column(self, name: str, values: list[int]) -> None:
        if self._set.get(name) != values:
            self.words[COLUMNS.index(name) :: len(COLUMNS)] = array("q", values)
            self._set[name] = values

    def load(self, grads: list[Tensor]) -> None:
        """Take these gradients for the next step."""
        places = list(addresses(grads))
        if 0 in places:
            check_memory({"grads": grads})
        self.set_column("grad", places)
        self.set_column("grad_dtype", codes_of(grads))
        status = library().vjepa_adamw_check(table_of(AdamWEntry, self.words), len(self.lists.params))
        if status == STATUS_OVERLAP:
            check_adamw_apart(self.lists._replace(grads=grads))
        check(status)

    def group(self, numbers: Numbers, number: int, hyper: Sequence[float], done: int = 0) -> AdamWGroup:
        """The library's row of a group; done: steps before this one, of parameters that do not say."""
        lr, factor = (values[number].data_ptr() if values else None for values in (numbers.lrs, numbers.grad_factors))
        return AdamWGroup(*hyper, done, lr, factor)


def scalars_of(numbers: Numbers) -> tuple[AdamWScalars, float]:
    """What the whole step is told; the momentum by value unless it is a tensor."""
    found_inf = None if numbers.found_inf is None else numbers.found_inf.data_ptr()
    if isinstance(numbers.momentum, Tensor):
        return AdamWScalars(found_inf, numbers.momentum.data_ptr()), 0.0
    return AdamWScalars(found_inf, None), numbers.momentum


class CPUStep(Step):
    """In one threaded pass on the CPU, which counts the steps; the result does not depend on the number of threads."""

    def __init__(self, lists: Lists) -> None:
        super().__init__(lists)
        self.set_column("step", list(addresses(lists.steps)))

    def run(self, numbers: Numbers) -> None:
        rows, groups = [], []
        for number, (places, hyper) in enumerate(numbers.groups()):
            rows.append(self.group(numbers, number, hyper))
            groups += [number] * (places.stop - places.start)
        self.set_column("group", groups)
        scalars, momentum = scalars_of(numbers)
        threads = torch.get_num_threads()
        table, group_rows = table_of(AdamWEntry, self.words), (AdamWGroup * len(rows))(*rows)
        check(library().vjepa_adamw_cpu(table, len(table), group_rows, len(rows), scalars, momentum, threads))


class CUDAStep(Step):
    """In one launch on the current stream of a CUDA device, or one for each 32 groups; asynchronous.

    Steps on the device are counted there. Those on the host are read there, and parameters of one group with unlike
    steps become groups of their own.
    """

    def __init__(self, lists: Lists) -> None:
        super().__init__(lists)
        self.device = lists.params[0].device
        self.counted = [step for step in lists.steps if step.numel()]
        self.on_host = bool(self.counted) and self.counted[0].device != self.device
        self.tables: dict[tuple[int, int], DeviceTable] = {}
        if not self.on_host:
            self.set_column("step", list(addresses(lists.steps)))

    def run(self, numbers: Numbers) -> None:
        scalars, momentum = scalars_of(numbers)
        for start, end, rows in self.windows(numbers):
            group_rows = (AdamWGroup * len(rows))(*rows)
            own = self.words[start * len(COLUMNS) : end * len(COLUMNS)]
            table = self.tables.get((start, end))
            if table is None:
                numels = map(Tensor.numel, self.lists.params[start:end])
                table = self.tables[start, end] = DeviceTable(numels, CHUNK_ELEMENTS, self.device)
            table.launch(own, library().vjepa_adamw_cuda, group_rows, len(rows), scalars, momentum)
        if self.counted:
            done = 1 if numbers.found_inf is None else (numbers.found_inf == 0).to(torch.float32)
            torch._foreach_add_(self.counted, done)

    def windows(self, numbers: Numbers) -> list[tuple[int, int, list[AdamWGroup]]]:
        """Runs of parameters that are updated by one launch, with their groups; writes the column of groups."""
        done = [0.0] * len(self.lists.params)
        if self.on_host:
            counts = iter(torch.stack(self.counted).tolist())
            done = [next(counts) if step.numel() else 0.0 for step in self.lists.steps]
        windows: list[tuple[int, int, list[AdamWGroup]]] = []
        column: list[int] = []
        rows: dict[tuple[int, float], AdamWGroup] = {}
        start = 0
        for number, (places, hyper) in enumerate(numbers.groups()):
            for count, alike in groupby(done[places]):
                key = (number, count)
                if key not in rows and len(rows) == MAXIMUM_GROUPS:
                    windows.append((start, len(column), list(rows.values())))
                    start, rows = len(column), {}
                if key not in rows:
                    rows[key] = self.group(numbers, number, hyper, int(count))
                column += [list(rows).index(key)] * len(list(alike))
        windows.append((start, len(column), list(rows.values())))
        self.set_column("group", column)
        return windows
