"""A run small enough to be done many times: 2 blocks of width 48 on 4 frames of 32 x 32 from arrays in .npy files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa import VJEPA, Masks, VJEPAConfig
from vjepa.config import ModelConfig
from vjepa.data import DataConfig
from vjepa.masks import MaskConfig
from vjepa.train import PretrainConfig, RunConfig, TrainConfig

MODEL = {
    "image_size": 32,
    "num_frames": 4,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 2,
    "predictor_embed_dim": 24,
    "predictor_depth": 1,
}
TRAIN = {"total_steps": 12, "warmup_steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu"}
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from vjepa.config import ModelConfig
from vjepa.data import DataConfig
from vjepa.masks import MaskConfig
from vjepa.train import PretrainConfig, RunConfig, TrainConfig, pretrain
if __name__ == "__main__":
    torch.set_num_threads(1)
    c = json.loads(sys.argv[1])
    sections = TrainConfig(**c["train"]), RunConfig(**c["run"]), DataConfig(**c["data"])
    config = PretrainConfig(*sections, ModelConfig(**c["model"]), MaskConfig(**c["masks"]))
    result = pretrain(config)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(*(name for name in threads if "gloo" in name))
    sys.exit(result.exit_code)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: bit-identity needs the same number everywhere, and tiny matrices want no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of moving noise as arrays [T, H, W, C]."""
    folder = tmp_path_factory.mktemp("videos")
    generator = np.random.default_rng(0)
    for number in range(6):
        still = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        np.save(folder / f"video{number}.npy", np.stack([np.roll(still, number + t, axis=t % 2) for t in range(16)]))
    return folder


@pytest.fixture
def run_config(videos: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Builds a run's configuration; keyword arguments replace fields of its sections."""

    def build(name: str = "run", **changes: dict[str, Any]) -> PretrainConfig:
        run = {"dir": str(tmp_path / name), "log_every": 1, "checkpoint_every": 4, "tensorboard": False}
        data = {"path": str(videos), "frame_stride": 2, "num_workers": 0}
        return PretrainConfig(
            TrainConfig(**{**TRAIN, **changes.get("train", {})}),
            RunConfig(**{**run, **changes.get("run", {})}),
            DataConfig(**{**data, **changes.get("data", {})}),
            ModelConfig(**{**MODEL, **changes.get("model", {})}),
            MaskConfig(**changes.get("masks", {})),
        )

    return build


@pytest.fixture
def model() -> VJEPA:
    """The tiny model with weights of seed 0."""
    torch.manual_seed(0)
    return VJEPA(VJEPAConfig(**MODEL))


@pytest.fixture
def train_config() -> TrainConfig:
    return TrainConfig(**TRAIN)


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, Masks]]:
    """Makes clips and masks, each seed its own."""

    def make(seed: int = 0, clips: int = 4) -> tuple[torch.Tensor, Masks]:
        generator = torch.Generator().manual_seed(seed)
        video = torch.randint(0, 256, (clips, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
        return video, MaskConfig().build((2, 4, 4))(clips, generator)

    return make


@pytest.fixture
def start_run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(config: PretrainConfig, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(config.to_dict())],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
