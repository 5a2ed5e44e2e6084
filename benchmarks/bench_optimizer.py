"""One optimizer step of a ViT, float32: AdamW and the moving average of the weights, with bfloat16 copies of both.

Bytes counted for a parameter: read parameter, gradient, two moments and shadow (20), write all but the gradient (16) and
two bfloat16 copies (4): 40, and 36 without copies. Peers need a second pass for the average and two more for the copies,
but for the compiled one: a function of one tensor, called for each. One function of all 121 is left out: compiling
it takes 45 s on two cores of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vjepa.kernels import AdamWEMA

from .bench_ema import SIZES, VIT_L, alpha_loop, shapes
from .harness import COMPILED, Work, compiled
from .machine import available_memory

MOMENTUM = 0.998
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.05
HYPER = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
ROUNDING = 1e-6  # relative and absolute, of sums of a few terms that were rounded in another order
FLOP = 17
BEST = "AdamW(fused) + foreach"
NEEDED = 14e9  # bytes of a ViT-L, which has 24 for each parameter, if an optimizer copies the moments, and temporaries
SAMPLED = 251  # of a ViT-L each so many-th element is checked: all of them in float64 would be as large again


class Network:
    """Parameters with gradients, shadows, moments, and our optimizer with its copies; all contenders share the tensors.

    With `clip`, gradients are to be multiplied by the scalar `factor`. Of each tensor every `every`-th element is checked.
    """

    def __init__(
        self, device: torch.device, size: tuple[str, int, int], copies: bool, clip: bool = False, every: int = 1
    ) -> None:
        model, width, depth = size

        def draw() -> list[Tensor]:
            return [torch.randn(shape, device=device) for shape in shapes(width, depth)]

        self.params = [nn.Parameter(tensor) for tensor in draw()]
        self.shadows, self.grads = draw(), draw()
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.weights = [param.detach() for param in self.params]
        self.factor = torch.ones((), device=device) if clip else None
        self.every = every
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))
        dtype = torch.bfloat16 if copies else None
        self.ours = self.started(AdamWEMA(self.params, self.shadows, **HYPER, momentum=MOMENTUM, copies=dtype))
        self.pairs = (self.weights, self.shadows)
        self.copies = [self.ours.param_copies, self.ours.shadow_copies] if copies else []
        self.numel = sum(weight.numel() for weight in self.weights)
        features = [model, f"{self.numel / 1e6:.0f} M parameters"]
        self.name = ", ".join(features + ["bf16 copies"] * copies + ["with clipping"] * clip)

    def started(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """`optimizer` with the moments of the network, which loading does not copy."""
        moments = enumerate(zip(self.exp_avgs, self.exp_avg_sqs, strict=True))
        state = {i: {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second} for i, (first, second) in moments}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return optimizer

    def sample(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[:: self.every]


class Step:
    """One way to take a step: what is done in it, one after the other, and who has the number of steps in its `state`."""

    def __init__(self, network: Network, optimizer: object, *calls: Callable[[], object]) -> None:
        self.network, self.optimizer, self.calls = network, optimizer, calls

    def __call__(self) -> None:
        for call in self.calls:
            call()


# ---------------------------------------------------------------------------------------------------------------- peers


def foreach(network: Network) -> None:
    """The average, then the copies."""
    torch._foreach_lerp_(network.shadows, network.weights, 1 - MOMENTUM)
    for copies, tensors in zip(network.copies, network.pairs, strict=False):
        torch._foreach_copy_(copies, tensors)


def loop(network: Network) -> None:
    alpha_loop(network.shadows, network.weights)
    for copies, tensors in zip(network.copies, network.pairs, strict=False):
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)


def adamw(network: Network, after: Callable[[Network], None], **options: bool) -> Step:
    optimizer = network.started(torch.optim.AdamW(network.params, **HYPER, **options))
    return Step(network, optimizer, optimizer.step, partial(after, network))


def clipped(network: Network, inside: bool) -> Step:
    """Gradients multiplied in a pass before the step, or inside AdamW's kernel, which divides by its scale."""
    step = adamw(network, foreach, fused=True)

    def scale() -> None:
        if inside:
            step.optimizer.grad_scale = network.factor.reciprocal()
        else:
            torch._foreach_mul_(network.grads, network.factor)

    return Step(network, step.optimizer, scale, *step.calls)


def one_tensor(param, grad, first, second, shadow, copies, rate, correction) -> None:  # all tensors
    """All that happens to one tensor, for torch.compile; copies: of the parameter and of the shadow, or none."""
    first.lerp_(grad, 1 - BETA1)
    second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    param.mul_(1 - LR * DECAY).sub_(rate * first / (second.sqrt() / correction + EPS))
    shadow.lerp_(param, 1 - MOMENTUM)
    for copy, tensor in zip(copies, (param, shadow), strict=False):
        copy.copy_(tensor)


class ByHand:
    """Two ways to step without an optimizer; `state` as torch.optim.AdamW has it."""

    def __init__(self, network: Network) -> None:
        self.network, self.number = network, torch.zeros(())
        moments = zip(network.params, network.exp_avgs, network.exp_avg_sqs, strict=True)
        self.state = {p: {"step": self.number, "exp_avg": first, "exp_avg_sq": second} for p, first, second in moments}

    def corrections(self) -> tuple[float, float]:
        """What the learning rate and the root of the second moment are divided by in the step that begins."""
        number = int(self.number.add_(1))
        return 1 - BETA1**number, (1 - BETA2**number) ** 0.5

    def foreach(self) -> None:
        """Passes over all tensors, in the order of apex's FusedAdamSWA: AdamW, the average, the copies."""
        network, (correction1, correction2) = self.network, self.corrections()
        params, grads, seconds = network.weights, network.grads, network.exp_avg_sqs
        torch._foreach_mul_(params, 1 - LR * DECAY)
        torch._foreach_lerp_(network.exp_avgs, grads, 1 - BETA1)
        torch._foreach_mul_(seconds, BETA2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - BETA2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, correction2)
        torch._foreach_add_(roots, EPS)
        torch._foreach_addcdiv_(params, network.exp_avgs, roots, -LR / correction1)
        foreach(network)

    def each(self) -> Callable[[], None]:
        """Calls one compiled function, of any number of elements, for each tensor."""
        function, network = compiled(one_tensor, dynamic=True), self.network
        lists = (
            network.weights,
            network.grads,
            network.exp_avgs,
            network.exp_avg_sqs,
            network.shadows,
            *network.copies,
        )
        flat = [[tensor.view(-1) for tensor in tensors] for tensors in lists]

        def step() -> None:
            correction1, correction2 = self.corrections()
            scalars = [torch.full((), x, device=network.weights[0].device) for x in (LR / correction1, correction2)]
            for param, grad, first, second, shadow, *copies in zip(*flat, strict=True):
                function(param, grad, first, second, shadow, copies, *scalars)

        return step


def by_hand(network: Network) -> Step:
    optimizer = ByHand(network)
    return Step(network, optimizer, optimizer.foreach)


def compiled_each(network: Network) -> Step:
    optimizer = ByHand(network)
    return Step(network, optimizer, optimizer.each())


COMPILED_EACH = f"{COMPILED}: a call for each tensor"
PEERS = {
    BEST: lambda network: adamw(network, foreach, fused=True),
    "AdamW(foreach) + foreach": lambda network: adamw(network, foreach, foreach=True),
    "loop": lambda network: adamw(network, loop, foreach=False),
    "foreach by hand": by_hand,
    COMPILED_EACH: compiled_each,
}
CLIPPED_PEERS = {
    f"foreach_mul_ + {BEST}": lambda network: clipped(network, inside=False),
    "AdamW(fused, grad_scale) + foreach": lambda network: clipped(network, inside=True),
}


# ---------------------------------------------------------------------------------------------------------------- works


def verify(step: Step, factor: float) -> None:
    """Parameters, shadows and moments against the equations in float64, from wherever they are; the copies exactly.

    Gradients are checked to be multiplied by a factor of a half (which shows in the moments alone at a first step), after
    which they and the factor are as before.
    """
    network, sample = step.network, step.network.sample
    share, before = 1.0, []
    if network.factor is not None:
        share, before = 0.5, [grad.clone() for grad in network.grads]
        network.factor.fill_(share)
    expected: list[list[Tensor]] = [[], [], [], []]
    for param, shadow in zip(network.params, network.shadows, strict=True):
        p, g, s = sample(param).double(), share * sample(param.grad).double(), sample(shadow).double()
        state = step.optimizer.state[param]
        number = float(state["step"]) + 1
        a = BETA1 * sample(state["exp_avg"]).double() + (1 - BETA1) * g
        q = BETA2 * sample(state["exp_avg_sq"]).double() + (1 - BETA2) * g**2
        root = (q / (1 - BETA2**number)).sqrt() + EPS
        p = p * (1 - LR * DECAY) - LR / (1 - BETA1**number) * a / root
        for values, value in zip(expected, (p, MOMENTUM * s + (1 - MOMENTUM) * p, a, q), strict=True):
            values.append(value)
    step()
    if network.factor is not None:
        torch._foreach_copy_(network.grads, before)
        network.factor.fill_(1)
    states = [step.optimizer.state[param] for param in network.params]
    moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    for tensors, values in zip((*network.pairs, *moments), expected, strict=True):
        for tensor, value in zip(tensors, values, strict=True):
            assert ((sample(tensor) - value).abs_() <= value.abs().mul_(ROUNDING).add_(ROUNDING)).all()
    for copies, tensors in zip(network.copies, network.pairs, strict=False):
        for copy, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(sample(copy), sample(tensor).bfloat16())


def measure(compare, network: Network, peers: dict[str, Callable[[Network], Step]], also: str | None = BEST) -> None:
    factors = {} if network.factor is None else {"grad_factor": [network.factor]}
    ours = Step(network, network.ours, partial(network.ours.step, **factors))
    needs = {"bytes_moved": (40 if network.copies else 36) * network.numel, "flop": FLOP * network.numel}
    shapes_of = {"parameters": [network.numel]}
    work = Work("optimizer", network.name, "float32", shapes_of, **needs, in_place=True, also=also)
    compare(work, "adamw_ema_", ours, {name: make(network) for name, make in peers.items()}, verify=verify)


def bench_optimizer(compare, device):
    measure(compare, Network(device, SIZES[device.type], copies=False), PEERS)


def bench_optimizer_with_copies(compare, device):
    measure(compare, Network(device, SIZES[device.type], copies=True), PEERS)


def bench_optimizer_with_clipping(compare, device):
    measure(compare, Network(device, SIZES[device.type], copies=True, clip=True), CLIPPED_PEERS, also=None)


def bench_optimizer_large(compare, device):
    """On a CPU too the size of a ViT-L, whose tensors no cache holds; ours and the best of the peers."""
    if SIZES[device.type] == VIT_L:
        pytest.skip("the other works have this size on such a device")
    if (available := available_memory()) < NEEDED:
        pytest.skip(f"{NEEDED / 1e9:.0f} GB of memory are needed, {available / 1e9:.1f} GB are available")
    best = {name: PEERS[name] for name in (BEST, COMPILED_EACH)}
    measure(compare, Network(device, VIT_L, copies=True, every=SAMPLED), best)
