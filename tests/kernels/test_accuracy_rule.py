"""The rule that judges the kernels is itself judged: it must refuse what it is there to refuse."""

from __future__ import annotations

import pytest
import torch

EXACT = torch.linspace(-3, 3, 101, dtype=torch.float64)
ROUNDED = EXACT.bfloat16()


def test_accepts_the_same_result_and_twice_its_error(check_accuracy):
    check_accuracy(ROUNDED, ROUNDED, EXACT)
    check_accuracy((EXACT + 1.5e-3).float(), (EXACT + 1e-3).float(), EXACT)


def test_accepts_one_rounding_where_pytorch_is_exact(check_accuracy):
    exact = torch.ones(3, dtype=torch.float64)
    check_accuracy(exact.float() * (1 + 2**-23), exact.float(), exact)


def test_refuses_three_times_the_error(check_accuracy):
    with pytest.raises(AssertionError, match=r"error 0\.003"):
        check_accuracy((EXACT + 3e-3).float(), (EXACT + 1e-3).float(), EXACT)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_limit_is_twice_the_error_in_either_direction(check_accuracy, dtype, sign):
    exact = torch.full((5,), 64.0, dtype=torch.float64)  # whole numbers near it are exact in every dtype
    plain = exact.to(dtype) + 1
    check_accuracy(exact.to(dtype) + 2 * sign, plain, exact)
    with pytest.raises(AssertionError, match="error 3, PyTorch's in torch"):
        check_accuracy(exact.to(dtype) + 3 * sign, plain, exact)


def test_the_reference_is_float64(check_accuracy):
    with pytest.raises(AssertionError):
        check_accuracy(EXACT.float(), EXACT.float(), EXACT.float())


def test_refuses_to_judge_by_a_result_of_pytorch_that_is_no_number(check_accuracy):
    plain = EXACT.float()
    plain[3] = float("nan")
    with pytest.raises(AssertionError):
        check_accuracy(EXACT.float(), plain, EXACT)


def test_refuses_a_single_wrong_element(check_accuracy):
    wrong = EXACT.float()
    wrong[50] += 1e-3
    with pytest.raises(AssertionError):
        check_accuracy(wrong, EXACT.float(), EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_finite(check_accuracy, value):
    wrong = EXACT.float()
    wrong[0] = value
    with pytest.raises(AssertionError):
        check_accuracy(wrong, EXACT.float(), EXACT)


def test_refuses_other_dtypes_and_shapes(check_accuracy):
    with pytest.raises(AssertionError):
        check_accuracy(EXACT.float(), ROUNDED, EXACT)
    with pytest.raises(AssertionError):
        check_accuracy(EXACT.float()[:1], EXACT.float()[:1], EXACT)
