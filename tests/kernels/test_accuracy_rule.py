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
