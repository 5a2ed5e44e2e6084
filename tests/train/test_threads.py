"""Threads of the training process beside the loader's workers."""

import os
from pathlib import Path

import pytest
import torch

from vjepa.checkpoint import list_checkpoints, read_state
from vjepa.train import Trainer, pretrain, threads
from vjepa.train.threads import compute_threads, threads_beside


@pytest.fixture
def processors(monkeypatch):
    """Sets the logical processors and the threads PyTorch would take."""
    before = torch.get_num_threads()
    monkeypatch.delenv(threads.PROCESSES, raising=False)

    def have(count: int, torch_threads: int | None = None) -> None:
        monkeypatch.setattr(threads, "usable_processors", lambda: count)
        torch.set_num_threads(torch_threads or count)

    yield have
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "workers", "expected"), [(8, 2, 6), (8, 0, 8), (8, 9, 4), (2, 1, 1), (1, 3, 1)])
def test_workers_keep_their_processors_and_computing_keeps_half(processors, count, workers, expected):
    processors(count)
    assert threads_beside(workers) == expected


def test_a_chosen_number_of_threads_is_never_raised(processors):
    processors(8, torch_threads=3)
    assert threads_beside(1) == 3


def test_training_processes_share_the_machine(processors, monkeypatch):
    processors(8)
    monkeypatch.setenv(threads.PROCESSES, "2")
    assert threads_beside(1) == 3


def test_threads_are_as_before_after_an_error(processors):
    processors(2)
    with compute_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), compute_threads(1):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_usable_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert threads.usable_processors() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert threads.usable_processors() == 7


def spy(monkeypatch):
    """Threads in each step that is trained from now on."""
    seen, step = [], Trainer.step

    def watched(self, *arguments, **options):
        seen.append(torch.get_num_threads())
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", watched)
    return seen


def test_a_run_computes_with_what_workers_leave_and_resumes_with_as_many(processors, run_config, monkeypatch):
    processors(4)
    seen = spy(monkeypatch)
    config = run_config(data={"num_workers": 1, "start_method": "fork"}, train={"steps": 2})
    pretrain(config)
    assert seen == [3, 3]
    assert torch.get_num_threads() == 4
    assert read_state(list_checkpoints(Path(config.run.dir))[-1])["extra"]["threads"] == [3]
    pretrain(run_config(data={"num_workers": 0}, run={"resume": True}, train={"steps": 4}))
    assert seen == [3] * 4


def test_a_machine_with_fewer_threads_is_told(processors, run_config, monkeypatch, caplog):
    processors(4)
    pretrain(run_config(train={"steps": 1}))
    processors(2)
    seen = spy(monkeypatch)
    pretrain(run_config(run={"resume": True}, train={"steps": 2}))
    assert seen == [2]
    assert "computed with 4 threads and continues with 2: equal to rounding, not bit for bit" in caplog.text
