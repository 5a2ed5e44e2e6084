"""One optimizer step of a ViT, float32: AdamW and the moving average of the weights, with bfloat16 copies of both.

Bytes counted for a parameter: read parameter, gradient, two moments and shadow (20), write all but the gradient (16) and
two bfloat16 copies (4): 40, and 36 without copies. Peers need a second pass for the average and two more for the copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vjepa.kernels import AdamWEMA

from .bench_ema import SIZES, shapes
from .harness import Work

MOMENTUM = 0.998
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
ROUNDING = 1e-6  # relative and absolute, of sums of a few terms that were rounded in another order
FLOP = 17


class Network:
    """Parameters with gradients, their shadows, and bfloat16 copies of both; all contenders update the same."""

    def __init__(self, device: torch.device, copies: bool) -> None:
        self.model, width, depth = SIZES[device.type]

        def draw() -> list[Tensor]:
            return [torch.randn(shape, device=device) for shape in shapes(width, depth)]

        self.params = [nn.Parameter(tensor) for tensor in draw()]
        self.shadows = draw()
        for param, grad in zip(self.params, draw(), strict=True):
            param.grad = grad
        self.weights = [param.detach() for param in self.params]
        self.pairs = (self.weights, self.shadows)
        self.copies = [[tensor.bfloat16() for tensor in tensors] for tensors in self.pairs] if copies else []


class Step:
    """One way to take a step: an optimizer with moments of its own, and what it leaves to be done after it."""

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer, after: Callable[[], None] | None) -> None:
        self.network, self.optimizer, self.after = network, optimizer, after

    def __call__(self) -> None:
        self.optimizer.step()
        if self.after is not None:
            self.after()

    def copies(self) -> list[list[Tensor]]:
        return self.network.copies


class Ours(Step):
    def copies(self) -> list[list[Tensor]]:
        return [self.optimizer.param_copies, self.optimizer.shadow_copies] if self.network.copies else []


def peers(network: Network) -> dict[str, Step]:
    def foreach() -> None:
        torch._foreach_lerp_(network.shadows, network.weights, 1 - MOMENTUM)
        for copies, tensors in zip(network.copies, network.pairs, strict=False):
            torch._foreach_copy_(copies, tensors)

    def loop() -> None:
        for shadow, weight in zip(network.shadows, network.weights, strict=True):
            shadow.mul_(MOMENTUM).add_(weight, alpha=1 - MOMENTUM)
        for copies, tensors in zip(network.copies, network.pairs, strict=False):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)

    def adamw(after: Callable[[], None], **options: bool) -> Step:
        return Step(network, torch.optim.AdamW(network.params, **HYPER, **options), after)

    return {
        "AdamW(fused) + foreach": adamw(foreach, fused=True),
        "AdamW(foreach) + foreach": adamw(foreach, foreach=True),
        "loop": adamw(loop, foreach=False),
    }


def verify(step: Step, factor: float) -> None:
    """The parameters and shadows against the equations in float64, from wherever they are; the copies exactly."""
    network, (beta1, beta2), lr = step.network, HYPER["betas"], HYPER["lr"]
    expected: list[list[Tensor]] = [[], []]
    for param, shadow in zip(network.params, network.shadows, strict=True):
        p, g, s = param.detach().double(), param.grad.double(), shadow.double()
        state = step.optimizer.state[param] or {"step": 0.0, "exp_avg": 0 * g, "exp_avg_sq": 0 * g}
        number = float(state["step"]) + 1
        a = beta1 * state["exp_avg"].double() + (1 - beta1) * g
        q = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * g**2
        root = (q / (1 - beta2**number)).sqrt() + HYPER["eps"]
        p = p * (1 - lr * HYPER["weight_decay"]) - lr / (1 - beta1**number) * a / root
        expected[0].append(p)
        expected[1].append(MOMENTUM * s + (1 - MOMENTUM) * p)
    step()
    for tensors, values in zip(network.pairs, expected, strict=True):
        for tensor, value in zip(tensors, values, strict=True):
            assert ((tensor - value).abs_() <= value.abs().mul_(ROUNDING).add_(ROUNDING)).all()
    for copies, tensors in zip(step.copies(), network.pairs, strict=False):
        assert all(torch.equal(copy, tensor.bfloat16()) for copy, tensor in zip(copies, tensors, strict=True))


def measure(compare, device: torch.device, copies: bool) -> None:
    network = Network(device, copies)
    dtype = torch.bfloat16 if copies else None
    optimizer = AdamWEMA(network.params, network.shadows, **HYPER, momentum=MOMENTUM, copies=dtype)
    parameters = sum(weight.numel() for weight in network.weights)
    name = f"{network.model}, {parameters / 1e6:.0f} M parameters{', bf16 copies' if copies else ''}"
    moved = (40 if copies else 36) * parameters
    work = Work("optimizer", name, "float32", {"parameters": [parameters]}, bytes_moved=moved, flop=FLOP * parameters)
    compare(work, "adamw_ema_", Ours(network, optimizer, None), peers(network), verify=verify)


def bench_optimizer(compare, device):
    measure(compare, device, copies=False)


def bench_optimizer_with_copies(compare, device):
    measure(compare, device, copies=True)
