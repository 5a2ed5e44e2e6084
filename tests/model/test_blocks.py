"""A block of which only some tokens are wanted: their values and all gradients are those of the whole block."""

from __future__ import annotations

import pytest
import torch

from vjepa.model.blocks import Block, Wanted, run_blocks

LENGTHS = (5, 3, 7)
OF = ([0, 4], [1], [2, 3, 6])  # the wanted tokens of each sequence


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def wanted() -> Wanted:
    starts = offsets(LENGTHS).tolist()
    rows = torch.tensor([start + place for start, places in zip(starts, OF, strict=False) for place in places])
    lengths = tuple(map(len, OF))
    return Wanted(rows, offsets(lengths), lengths)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_wanted_tokens_are_those_of_all(depth: int, checkpointing: bool) -> None:
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(16, 2, 2.0) for _ in range(depth)).double()
    x = torch.randn(sum(LENGTHS), 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 16, dtype=torch.float64)
    results = []
    for its in (None, wanted()):
        total, branch = run_blocks(blocks, x, offsets(LENGTHS), LENGTHS, checkpointing, its)
        total = total if branch is None else total + branch
        total = total[wanted().rows] if its is None else total
        results.append([total, *torch.autograd.grad(total, [x, *blocks.parameters()], grad)])
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)


def test_nothing_is_computed_of_tokens_that_are_not_wanted() -> None:
    """The MLP and the queries of the last block see the wanted tokens alone; the blocks before see all."""
    blocks = torch.nn.ModuleList(Block(16, 2, 2.0) for _ in range(2))
    rows: list[int] = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda module, args, result: rows.append(len(args[0])))
        block.attn.proj.register_forward_hook(lambda module, args, result: rows.append(len(args[0])))
    run_blocks(blocks, torch.randn(15, 16), offsets(LENGTHS), LENGTHS, False, wanted())
    assert rows == [15, 15, 6, 6]
