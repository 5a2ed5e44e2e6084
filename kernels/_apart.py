"""Whether tensors that are written have memory of their own, which no order of reading and writing could replace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ._native import one_run


class _Span(NamedTuple):
    """From the first to the last byte of a tensor's elements."""

    device: str
    begin: int
    end: int
    name: str
    tensor: Tensor
    written: bool
    gaps: bool


def _span(name: str, tensor: Tensor, written: bool) -> _Span:
    gaps = not (tensor.is_contiguous() or one_run(tensor))
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return _Span(str(tensor.device), begin, begin + (last + 1) * tensor.element_size(), name, tensor, written, gaps)


def _places(tensor: Tensor) -> Tensor:
    """First byte of each element, in no order."""
    places = torch.tensor([tensor.data_ptr()], device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, device="cpu") * (stride * tensor.element_size())
        places = (places[:, None] + steps).flatten()
    return places


def _nested(tensor: Tensor) -> bool:
    """Whether each stride steps over all that smaller ones reach, as in every view that slices make."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _shares_with_itself(tensor: Tensor) -> bool:
    return not _nested(tensor) and len(_places(tensor).unique()) < tensor.numel()


def _share(one: _Span, other: _Span) -> bool:
    """Whether tensors whose spans overlap have a byte in common."""
    if not (one.gaps or other.gaps):
        return True
    starts, others = _places(one.tensor), _places(other.tensor).sort().values
    before = torch.searchsorted(others, starts + one.tensor.element_size()) - 1  # the last that begins before the end
    ends = others[before.clamp(min=0)] + other.tensor.element_size()
    return bool(((before >= 0) & (ends > starts)).any())


def check_apart(written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise if a tensor that is written shares memory with another one, or its elements with each other."""
    spans = [
        _span(f"{name}[{number}]", tensor, is_written)
        for lists, is_written in ((written, True), (read, False))
        for name, tensors in lists.items()
        for number, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    for span in spans:
        if span.written and span.gaps and _shares_with_itself(span.tensor):
            strides = span.tensor.stride()
            raise ValueError(f"{span.name} must have memory for each of its elements, got strides {strides}")
    spans.sort(key=lambda span: span[:4])
    open_spans: list[_Span] = []  # those that reach beyond where the next begins
    for span in spans:
        open_spans = [one for one in open_spans if one.device == span.device and one.end > span.begin]
        for one in open_spans:
            if (one.written or span.written) and _share(one, span):
                raise ValueError(
                    f"{span.name} must have memory of its own, got a tensor that shares it with {one.name}"
                )
        open_spans.append(span)


class Reach:
    """From where to where tensors that are written reach, to see quickly that others lie elsewhere; of one device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans = sorted(_span("", tensor, True)[1:3] for tensor in tensors if tensor.numel())
        self._begins = [begin for begin, _ in spans]
        self._ends = list(accumulate((end for _, end in spans), max))

    def leaves(self, tensors: Iterable[Tensor]) -> bool:
        """Whether none of these lies where they reach."""
        for tensor in filter(Tensor.numel, tensors):
            _, begin, end, *_ = _span("", tensor, False)
            before = bisect_left(self._begins, end)
            if before and self._ends[before - 1] > begin:
                return False
        return True
