"""AdamWEMA: AdamW, the exponential moving average of the weights, and low-precision copies of both, as one optimizer.

    g: gradient, p: parameter, s: shadow, k: step from 1
    p <- p - lr * weight_decay * p
    a <- b1 a + (1 - b1) g,   q <- b2 q + (1 - b2) g^2
    p <- p - lr * (a / (1 - b1^k)) / (sqrt(q / (1 - b2^k)) + eps)
    s <- m s + (1 - m) p                      then copies of p and s, rounded

One pass over memory moves 40 bytes for a float32 parameter: read p, g, a, q, s; write p, a, q, s and two bfloat16
copies. The native library takes that one; the reference takes three: torch's AdamW, the average, the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._adamw import Lists, Numbers, check_lists
from ._adamw_step import Step
from ._checks import describe
from ._dispatch import requested, without_autocast
from ._native import COPY_DTYPES
from ._optimizer_lists import Own, check_grads, gradients
from ._optimizer_numbers import STATE, Scalars, check_group, check_state, numbers_of, on_device
from ._tensor_lists import (
    WIDE,
    Kept,
    check_pairs,
    check_shards,
    layouts,
    local,
    local_list,
    plain,
    same,
    traced,
)
from .ema import momentum_tensor, momentum_value

FOREIGN = {"foreach": None, "fused": None, "differentiable": False}  # what torch.optim.AdamW also keeps in its groups


def _moves_nothing(grads: list[Tensor], numbers: Numbers) -> bool:
    """Whether there are gradients, all of them 0, and so is lr; one on a device passes for another."""
    learns = numbers.lrs or any(lr for _, (lr, *_) in numbers.groups())
    return bool(grads) and not learns and not any(bool(local(grad).any()) for grad in grads)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return nn.Parameter(local(tensor).detach().to(dtype, copy=True), requires_grad=False)


def _fixed(lists: Lists) -> Lists:
    """All but the gradients, which come and go and may be freed meanwhile."""
    return lists._replace(grads=[])


class _Prepared(NamedTuple):
    """A step, the tensors that it was prepared for, and the layouts of their gradients then."""

    kept: Kept
    lists: Lists
    grad_layouts: list[tuple[int, ...]] | None


class AdamWEMA(torch.optim.Optimizer):
    """AdamW on `params`, then shadow <- momentum * shadow + (1 - momentum) * param, then low-precision copies of both.

    Args:
        params: tensors or parameter groups, as for torch.optim.AdamW.
        shadows: one tensor or None for each parameter in the same order, float32, of its shape and device.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW, for each group; lr in units of the parameter.
        momentum: of the average, 0..1; set `.momentum` between steps to follow a schedule.
        copies: torch.bfloat16 or torch.float16: keep copies of parameters and shadows in this dtype.
        capturable: keep the counts of steps on the parameters' devices, so that a CUDA graph can replay a step. `lr` of a
            group may then be a 0-d float32 tensor and `momentum` a 0-d float64 tensor on the device, whose values are
            read when the step runs and not checked.

    Attributes:
        momentum: see above. It is not in the state_dict, which is exactly that of torch.optim.AdamW, to and from which
            it loads; nor are the shadows: they belong to the network that follows.
        param_copies, shadow_copies: lists in the order of the parameters (None where there is no shadow); empty without
            `copies`. Call `refresh_copies()` after writing to parameters or shadows by other means than `step()`. A network
            may compute with the copies themselves: let them require gradients, and `step` takes the gradient of a
            parameter that has none from its copy, in the copy's dtype (not under torch.amp.GradScaler, which looks at the
            gradients of parameters alone).

    A parameter without a gradient keeps its value, its shadow still follows. Everything is checked before anything is
    written. Groups added later have no shadows. Parameters may lie on several devices. DTensors are updated shard by
    shard, without communication. torch.amp.GradScaler unscales in the same pass, without waiting for the device, where
    the counts of steps lie with the parameters.

    Raises:
        TypeError, ValueError: tensors that do not pair up or share memory, shadows of lower precision than float32,
            numbers out of range, sparse gradients, amsgrad or maximize in a loaded state.
    """

    _own: Own | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        shadows: Iterable[Tensor | None],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float | Tensor = 0.998,
        copies: torch.dtype | None = None,
        capturable: bool = False,
    ) -> None:
        if copies is not None and copies not in COPY_DTYPES:
            raise TypeError(f"copies must be torch.bfloat16, torch.float16 or None, got {copies}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": bool(capturable)}
        check_group(defaults)
        flags = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
        super().__init__(params, {**defaults, **flags, **FOREIGN})  # the keys of torch.optim.AdamW, which loads them
        for group in self.param_groups:
            check_group(group)
        self.momentum = momentum
        self._kept: dict[str, _Prepared] = {}  # by the backend asked for
        all_params = [param for group in self.param_groups for param in group["params"]]
        if isinstance(shadows, Tensor) or not isinstance(shadows, Iterable):
            raise TypeError(f"shadows must be a list of tensors or None, got {describe(shadows)}")
        all_shadows = list(shadows)
        if len(all_shadows) != len(all_params):
            raise ValueError(f"shadows must have {len(all_params)} entries like params, got {len(all_shadows)}")
        paired = [(s, p) for s, p in zip(all_shadows, all_params, strict=True) if s is not None]
        for shadow, _ in paired:
            if not isinstance(shadow, Tensor):
                raise TypeError(f"shadows must be tensors or None, got {describe(shadow)}")
        check_shards(("params", "shadows"), [param for _, param in paired], [shadow for shadow, _ in paired])
        check_pairs(
            ("shadows", "params"),
            local_list(shadow for shadow, _ in paired),
            local_list(param for _, param in paired),
            WIDE,
            [place for place, shadow in enumerate(all_shadows) if shadow is not None],
        )
        self._shadows: dict[Tensor, Tensor] = {param: shadow for shadow, param in paired}
        self.param_copies: list[Tensor] = []
        self.shadow_copies: list[Tensor | None] = []
        if copies is not None:
            # as nn.Parameter, so that a module can hold them
            self.param_copies = [_copy(param, copies) for param in all_params]
            self.shadow_copies = [None if shadow is None else _copy(shadow, copies) for shadow in all_shadows]
        self._copies_of: dict[Tensor, tuple[Tensor, Tensor | None]] = dict(
            zip(all_params, zip(self.param_copies, self.shadow_copies, strict=True), strict=False)
        )

    @property
    def momentum(self) -> float | Tensor:
        """Momentum of the average at the next step, 0..1; a 0-d float64 tensor on a device is read there."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | Tensor) -> None:
        self._momentum = momentum_value(value)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write the low-precision copies again."""
        for param, (param_copy, shadow_copy) in self._copies_of.items():
            param_copy.copy_(local(param))
            if shadow_copy is not None:
                shadow_copy.copy_(local(self._shadows[param]))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler may leave its scale and what it found to `step`, instead of waiting for it."""
        groups = self.param_groups
        return all(group["capturable"] or not any(map(on_device, group["params"])) for group in groups)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_factor: Scalars = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """One update; returns what `closure` returns (None without one).

        Args:
            closure: computes the loss again, with gradients.
            grad_factor: what gradients are multiplied by, such as unscaling times clipping: a 0-d float32 tensor, or
                one (or None) for each group; it is not waited for. The gradients themselves stay.
            found_inf: 0-d float32 tensor; unless it is 0, parameters, moments and counts stay what they are and shadows
                still follow. It is not waited for; on a device it needs `capturable`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        learning, grads = gradients(params, self._copies_of)
        if learning is not params and getattr(self, "grad_scale", None) is not None:
            raise ValueError("params must have gradients of their own under torch.amp.GradScaler, got some of copies")
        numbers = numbers_of(self, grad_factor, found_inf)
        there = [grad for grad in grads if grad is not None]
        check_grads([tensor for tensor, grad in zip(learning, grads, strict=True) if grad is not None], there)
        if not self.state and _moves_nothing(there, numbers):
            # torch.distributed.checkpoint makes the state of a new optimizer by such a step: nothing may move in it
            numbers = numbers._replace(momentum=1.0)
        states, begun = self._states(params, grads)
        own = self._own
        if own is None or not same(own.params, params):
            own = self._own = Own(params, self._shadows, self._copies_of)
        lists = own.lists(grads, states)
        if traced() or not plain(lists.params):
            torch.ops.vjepa.adamw_ema_(*lists, *numbers._replace(momentum=momentum_tensor(numbers.momentum)))
        else:
            without_autocast(self._prepared(lists), lists.grads, numbers)
        self.state.update(begun)  # now that nothing was refused
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters and copies, or set them to 0."""
        super().zero_grad(set_to_none)
        for copy in self.param_copies:
            if set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.zero_()

    def _prepared(self, lists: Lists) -> Callable[[list[Tensor], Numbers], None]:
        """The step that was prepared for these tensors, as long as they are the same, whatever their gradients."""
        asked, grad_layouts = requested(), layouts(lists.grads)
        prepared = self._kept.pop(asked, None)
        if (
            prepared is None
            or grad_layouts != prepared.grad_layouts
            or not all(map(same, _fixed(lists), prepared.lists))
            or not prepared.kept.holds()
        ):
            check_lists(lists)  # others may have replaced what was checked before, or loaded the state of another model
            step = Step(lists)

            def run(grads: list[Tensor], numbers: Numbers) -> None:
                step.load(grads)
                step.run(numbers)

            moments = [*lists.exp_avgs, *lists.exp_avg_sqs, *lists.steps]
            places = [*moments, *lists.param_copies, *lists.shadow_copies]
            kept = Kept(run, [*lists.params, *lists.shadows], places)
            prepared = _Prepared(kept, _fixed(lists), grad_layouts)
        self._kept[asked] = prepared
        return prepared.kept.run

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an AdamWEMA or of a torch.optim.AdamW (without amsgrad and maximize).

        Raises:
            TypeError, ValueError: the state of another optimizer, numbers out of range; nothing is loaded then.
        """
        check_state(state_dict)
        capturable = [group["capturable"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, its in zip(self.param_groups, capturable, strict=True):
            group.update(FOREIGN, capturable=its)
            for param in group["params"]:
                state = self.state.get(param)
                if state:  # counted where this optimizer counts, whatever kernel wrote the state
                    step = torch.as_tensor(state["step"], dtype=torch.float32)
                    state["step"] = step.to(param.device if its else "cpu")

    def __getstate__(self) -> dict[str, Any]:
        own = ("_momentum", "_shadows", "param_copies", "shadow_copies", "_copies_of")
        # what is kept holds addresses, which are good in this process alone
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}, "_kept": {}}

    def _states(
        self, params: list[Tensor], grads: list[Tensor | None]
    ) -> tuple[list[dict[str, Tensor]], dict[Tensor, dict[str, Tensor]]]:
        """The states of the parameters, {} without any, and those of them that begin with their first gradient."""
        states, begun = [self.state.get(param) or {} for param in params], {}
        if not all(states):
            capturable = [group["capturable"] for group in self.param_groups for _ in group["params"]]
            for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if states[place] or grad is None:
                    continue
                step = torch.zeros((), device=param.device if capturable[place] else "cpu", dtype=torch.float32)
                moments = (torch.zeros_like(param, memory_format=torch.preserve_format) for _ in range(2))
                states[place] = dict(zip(STATE, (step, *moments), strict=True))
                begun[param] = states[place]
        return states, begun
