"""The operator of AdamWEMA refuses by itself what does not fit together, and then changes nothing."""

from __future__ import annotations

import pytest
import torch

from vjepa.kernels import _dispatch, backend
from vjepa.kernels._adamw import Lists, Numbers, check_lists
from vjepa.kernels._adamw_step import Step

CPU = torch.device("cpu")
BACKENDS = [name for name, why in _dispatch.explain("adamw_ema_", CPU).items() if why in _dispatch.RUNS]
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "shadows", "param_copies", "shadow_copies")
NOTHING = torch.empty(0)


def arguments():
    generator = torch.Generator().manual_seed(0)
    lists = {name: [torch.rand(4, generator=generator), torch.rand(3, generator=generator)] for name in NAMES}
    lists["steps"] = [torch.tensor(2.0), torch.tensor(2.0)]
    for name in NAMES[-2:]:
        lists[name] = [tensor.bfloat16() for tensor in lists[name]]
    numbers = {
        "group_sizes": [1, 1],
        "hyper": [1e-2, 0.9, 0.99, 1e-8, 0.1] * 2,
        "momentum": torch.tensor(0.9, dtype=torch.float64),
        "lrs": [],
        "grad_factors": [],
        "found_inf": None,
    }
    return {**lists, **numbers}


def call(given):
    torch.ops.vjepa.adamw_ema_(*given.values())


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"grads": [torch.zeros(4)]}, ValueError, "grads must have 2 tensors like params, got 1"),
        ({"shadows": [torch.zeros(4)]}, ValueError, "shadows must have 2 tensors like params, got 1"),
        ({"grads": []}, ValueError, "grads must have 2 tensors like params, got 0"),
        ({"grads": [torch.zeros(3), torch.zeros(3)]}, ValueError, r"grads\[0\] must be like params \(4,\) float32"),
        ({"grads": [NOTHING, torch.zeros(3)]}, ValueError, r"grads\[0\], its moments and its step must all be there"),
        (
            {"exp_avg_sqs": [torch.zeros(4), NOTHING]},
            ValueError,
            r"grads\[1\], its moments and its step must all be there",
        ),
        (
            {"steps": [torch.tensor(1.0), torch.ones(1)]},
            ValueError,
            r"steps\[1\] must be a float32 scalar .* got \(1,\)",
        ),
        (
            {"steps": [torch.tensor(1), torch.tensor(1.0)]},
            ValueError,
            r"steps\[0\] must be a float32 scalar .* got \(\) int64",
        ),
        ({"shadow_copies": [NOTHING, torch.zeros(3).bfloat16()]}, ValueError, r"shadow_copies\[0\] must be there with"),
        ({"shadows": [], "shadow_copies": arguments()["shadow_copies"]}, ValueError, "shadow_copies must come with"),
        ({"param_copies": [torch.zeros(4), torch.zeros(3).half()]}, TypeError, r"param_copies\[0\] and its shadow's"),
        ({"shadow_copies": [torch.zeros(4).half(), torch.zeros(3).bfloat16()]}, TypeError, r"param_copies\[0\] and"),
        ({"group_sizes": [1, 2]}, ValueError, r"group_sizes must sum to the 2 params, got \[1, 2\]"),
        ({"group_sizes": [3, -1]}, ValueError, r"group_sizes must sum to the 2 params, got \[3, -1\]"),
        ({"hyper": [0.1] * 5}, ValueError, "hyper must have 5 numbers for each of 2 groups, got 5"),
        ({"grad_factors": [torch.tensor(1.0)]}, ValueError, "grad_factors must have 2 tensors, one for each group"),
        ({"lrs": [torch.ones(1)] * 2}, TypeError, r"lrs\[0\] must be a 0-d float32 tensor, got \(1,\)"),
        ({"found_inf": torch.tensor(1)}, TypeError, r"found_inf must be a 0-d float32 tensor, got \(\) int64"),
        ({"momentum": torch.tensor(1.5, dtype=torch.float64)}, ValueError, "momentum must be between 0 and 1, got 1.5"),
        ({"momentum": torch.tensor(torch.nan)}, ValueError, "momentum must be between 0 and 1, got nan"),
    ],
)
def test_refuses(change, error, sentence, backend_name):
    given, before = arguments(), arguments()
    with backend(backend_name), pytest.raises(error, match=sentence):
        call({**given, **change})
    for name in NAMES:
        assert all(map(torch.equal, given[name], before[name]))


def test_numbers_out_of_range_are_refused_by_the_native_library():
    given, before = arguments(), arguments()
    given["hyper"] = [1e-2, 0.9, 0.99, 1e-8, 0.1, -1.0, 0.9, 0.99, 1e-8, 0.1]
    with backend("auto"), pytest.raises((RuntimeError, ValueError)):
        call(given)
    for name in NAMES:
        assert all(map(torch.equal, given[name], before[name]))


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_what_a_parameter_may_lack(backend_name):
    """Gradient with moments and step, shadow, copies: whatever is there is updated as if nothing else lacked."""
    whole = arguments()
    with backend(backend_name):
        call(whole)
        for lacking in (("shadows", "shadow_copies"), ("param_copies", "shadow_copies")):
            given = arguments()
            for name in lacking:
                given[name][1] = torch.empty(0)
            call(given)
            for name in NAMES:
                assert torch.equal(given[name][0], whole[name][0])
                assert not given[name][1].numel() or torch.equal(given[name][1], whole[name][1])


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_no_parameters(backend_name):
    given = {**arguments(), **{name: [] for name in NAMES}, "group_sizes": [0, 0]}
    with backend(backend_name):
        call(given)


def test_counts_of_steps_lie_where_they_are_needed():
    """All of a device's parameters beside them, or all on the host; beside them, if the step waits for nothing."""
    given = {**arguments(), **{name: [torch.empty(n, device="meta") for n in (4, 3)] for name in NAMES[:4]}}
    given.update(shadows=[], param_copies=[], shadow_copies=[])
    for name in NAMES[2:4]:
        given[name] = [tensor.clone() for tensor in given[name]]
    lists = Lists(*list(given.values())[:8])
    here, there = lists.steps[0], torch.zeros((), device="meta")
    check_lists(lists)
    check_lists(lists._replace(steps=[there, there.clone()]))
    for steps in ([here, there], [there, here]):
        with pytest.raises(ValueError, match="steps must lie all on the CPU or all with their params, got some here"):
            check_lists(lists._replace(steps=steps))
    numbers = Numbers(*list(given.values())[8:])
    for wanting in ({"found_inf": there}, {"lrs": [there, there]}):
        with pytest.raises(ValueError, match="steps must lie with their params where found_inf or lrs are given"):
            Step(lists).run(numbers._replace(**wanting))
