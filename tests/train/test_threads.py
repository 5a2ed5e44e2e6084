"""Threads of the training process beside the loader's workers."""

import pytest
import torch

from vjepa.train import threads
from vjepa.train.threads import cores_left_to_workers


@pytest.fixture
def eight_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "workers", "expected"), [("cpu", 2, 6), ("cpu", 0, 8), ("cpu", 9, 1), ("cuda", 2, 8)]
)
def test_workers_keep_their_cores(eight_cores, device, workers, expected):
    with cores_left_to_workers(torch.device(device), workers):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 8


def test_a_chosen_number_of_threads_is_never_raised(eight_cores):
    torch.set_num_threads(3)
    with cores_left_to_workers(torch.device("cpu"), 1):
        assert torch.get_num_threads() == 3


def test_threads_are_as_before_after_an_error(eight_cores):
    with pytest.raises(KeyError), cores_left_to_workers(torch.device("cpu"), 5):
        raise KeyError
    assert torch.get_num_threads() == 8


def test_usable_cores():
    assert threads.usable_cores() >= 1
