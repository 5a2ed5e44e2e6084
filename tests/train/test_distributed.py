"""Two processes over gloo: gradients are averaged, every rank has its own clips and masks, one of them writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vjepa.checkpoint import list_checkpoints
from vjepa.train import NonFiniteError, TrainConfig, Trainer
from vjepa.train.guard import save_bundle

HALVES = """
import json, sys
from pathlib import Path
import torch
from vjepa import VJEPA, VJEPAConfig
from vjepa.train import TrainConfig, Trainer
from vjepa.train.distributed import distributed_world
from vjepa.train.guard import load_batch

def run(world, model, train, batch, out):
    torch.manual_seed(0)
    trainer = Trainer(VJEPA(VJEPAConfig(**model)), TrainConfig(**train))
    trainer.itself = trainer  # freed by the garbage collector alone
    video, masks = load_batch(batch)
    for _ in range(3):
        numbers = trainer.step(video.tensor_split(2)[world.rank], masks.split(2)[world.rank])
    trainer.save(out)
    return numbers

if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed_world() as world:
        numbers = run(world, *json.loads(sys.argv[1]))
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(json.dumps([numbers, [name for name in threads if "gloo" in name]]))
"""


def torchrun_environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets for each of two processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_halves_in_two_parts_train_as_the_whole_batch(model, train_config, batch, tmp_path, port):
    video, masks = batch()
    whole = Trainer(model, train_config)
    bundle = save_bundle(tmp_path / "batch", whole, video, masks, NonFiniteError(0, {}, ()), [])
    settings = {**train_config.to_dict(), "accumulation_steps": 2}
    arguments = json.dumps([model.config.to_dict(), settings, str(bundle), str(tmp_path / "halves")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HALVES, arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **torchrun_environment(rank, port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (first, *left), (second, *left_there) = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert left == left_there == [[]], "the group's threads outlive it, and may kill a process that ends"
    for _ in range(3):
        numbers = whole.step(video, masks)
    assert first == second
    assert first == pytest.approx(numbers, rel=1e-4)
    halves = safetensors.torch.load_file(tmp_path / "halves" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if not name.endswith("qkv.bias"):  # the keys' share of it follows rounding noise
            torch.testing.assert_close(halves[name], tensor, rtol=1e-3, atol=2e-6, msg=name)


def test_run_of_two_processes_is_written_by_one(run_config, start_run, port):
    config = run_config(train={"total_steps": 3, "batch_size": 2})
    processes = [start_run(config, **torchrun_environment(rank, port)) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not any("gloo" in output for output in outputs)  # no thread of the group is left
    directory = Path(config.run.dir)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3
    state = json.loads((list_checkpoints(directory)[-1] / "state.json").read_text())
    assert len(state["random"]) == 2
    assert TrainConfig.from_dict(state["train"]) == config.train
