"""The network that a step computes with in bfloat16: the matrices are the optimizer's copies, the rest is the model's own.

AdamWEMA writes copies of weights and averages in the pass that updates them, so that no step casts a weight, and gradients
of matrices stay in the bfloat16 in which their product wrote them. What autocast leaves in float32 stays there: norms, mask
tokens, positions. The results are those of autocast, bit for bit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vjepa.kernels import AdamWEMA
from vjepa.model import VJEPA
from vjepa.model.encoder import TubeletProjection

COPIES = torch.bfloat16


class LowPrecision:
    """A twin of `model` that shares its memory, and the low-precision memory of `optimizer`, which has copies.

    Attributes:
        twin: the network to compute with; its gradients are those `optimizer` takes.
    """

    def __init__(self, model: VJEPA, optimizer: AdamWEMA) -> None:
        self._model, self._optimizer = model, optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        copies: dict[Tensor, Tensor] = dict(zip(params, optimizer.param_copies, strict=True))
        shadow_copies = dict(zip(params, optimizer.shadow_copies, strict=True))
        averages = dict(model.target_encoder.named_parameters())
        for name, param in model.encoder.named_parameters():
            shadow_copy = shadow_copies[param]
            assert shadow_copy is not None
            copies[averages[name]] = shadow_copy
        self._originals = [*model.parameters()]
        lowered: dict[Tensor, Tensor] = {param: copies[param] for param in _of_products(model)}
        for original, low in lowered.items():
            low.requires_grad_(original.requires_grad)
        tensors = [*model.parameters(), *model.buffers()]
        memo: dict[int, object] = {id(tensor): lowered.get(tensor, tensor) for tensor in tensors}
        self.twin: VJEPA = copy.deepcopy(model, memo)
        self.of: dict[Tensor, Tensor] = {param: lowered.get(param, param) for param in params}
        self._versions: list[tuple[int, int]] = []
        self.written()

    def written(self) -> None:
        """After a step of the optimizer: the copies are those of the weights as they are now."""
        self._versions = self._now()

    def refresh(self) -> None:
        """Before a step: write the copies again if somebody else has written to weights or averages, freeze what is frozen.

        A write through `.data` in place leaves no trace; `AdamWEMA.refresh_copies` is for those who do that.
        """
        for param, low in self.of.items():
            if low is not param and low.requires_grad != param.requires_grad:
                low.requires_grad_(param.requires_grad)
        for part in ("encoder", "predictor"):
            own, other = getattr(self._model, part), getattr(self.twin, part)
            other.activation_checkpointing = own.activation_checkpointing
        if self._now() != self._versions:
            self._optimizer.refresh_copies()
            self.written()

    def add_gradients(self) -> None:
        """Add the gradients of the copies to those of the weights, in float32, and forget them."""
        for param, low in self.of.items():
            if low is not param and low.grad is not None:
                param.grad = low.grad.float() if param.grad is None else param.grad.add_(low.grad)
                low.grad = None

    def _now(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self._originals]


def _of_products(model: nn.Module) -> list[Tensor]:
    """Weights and biases of matrix products, which autocast would cast: it leaves float64 alone."""
    products = [part for part in model.modules() if isinstance(part, nn.Linear | TubeletProjection)]
    params = [param for part in products for param in part.parameters(recurse=False)]
    return [param for param in params if param.dtype == torch.float32]
