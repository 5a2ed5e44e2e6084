"""Fixtures of the kernel tests: backends and devices, ragged sets, and the rule by which results are judged.

A test that takes `serving` runs once for each backend of the op; one that takes `device` runs on the GPU where there is
one and else on the CPU, where Triton's interpreter serves the Triton kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from vjepa.kernels import TokenIndices, backend

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is made


def make_sets(
    lengths: Sequence[int],
    length: int,
    clip: Sequence[int] | None = None,
    *,
    seed: int = 0,
    duplicates: bool = False,
    tensor_lengths: bool = False,
) -> TokenIndices:
    """Random sets of `lengths` token ids below `length`; with duplicates each id is drawn alone."""
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda n: torch.randint(length, (n,), generator=generator))
        if duplicates
        else (lambda n: torch.randperm(length, generator=generator)[:n])
    )
    packed = TokenIndices.from_sets([draw(n) for n in lengths], clip=clip)
    if not tensor_lengths:
        return packed
    return TokenIndices(packed.indices, packed.cu_seqlens, packed.clip, torch.tensor(packed.lengths))


def check_accuracy(ours: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """Our largest error against the float64 result is at most twice that of plain PyTorch in the same dtype.

    Where PyTorch happens to be exact, one rounding of the largest value is allowed.
    """
    assert exact.dtype == torch.float64
    assert ours.shape == same_dtype.shape == exact.shape
    assert ours.dtype == same_dtype.dtype
    assert torch.isfinite(ours).all()
    rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error, allowed = float((ours - exact).abs().max()), float((same_dtype - exact).abs().max())
    assert error <= 2 * max(allowed, rounding), f"error {error:.3g}, PyTorch's in {ours.dtype} {allowed:.3g}"


@pytest.fixture(name="make_sets", scope="session")
def make_sets_fixture() -> Callable[..., TokenIndices]:
    return make_sets


@pytest.fixture(name="check_accuracy", scope="session")
def check_accuracy_fixture() -> Callable[[Tensor, Tensor, Tensor], None]:
    return check_accuracy


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["reference", "auto", "triton"])
def serving(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced on the ops that have it; auto is the native library for what it can take on a CPU."""
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backend(request.param):
        yield request.param


@pytest.fixture
def used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or huge ints, so that an element that is never written shows."""

    def filled(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: object, **options: object) -> Tensor:
            fresh = plain(*arguments, **options)
            if fresh.dtype in (torch.int32, torch.int64):
                return fresh.fill_(torch.iinfo(fresh.dtype).max)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
