"""Checkpoints are whole or not there, and load strictly."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vjepa import checkpoint
from vjepa.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_model,
    prune_checkpoints,
    write_checkpoint,
)
from vjepa.train import Trainer

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3)}


def write(path: Path, step: int = 1) -> Path:
    return write_checkpoint(path, TENSORS, TENSORS, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_holds_three_files_and_replaces_an_older_one(tmp_path):
    write(tmp_path / "c", 1)
    write(tmp_path / "c", 2)
    assert names(tmp_path) == ["c"]
    assert names(tmp_path / "c") == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert checkpoint.read_state(tmp_path / "c") == {"format": 1, "step": 2}


def test_place_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="something that is not a checkpoint"):
        write(tmp_path / "c")
    assert names(tmp_path / "c") == ["thesis.txt"]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["save_tensors", "_flush"])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, failing):
    write(tmp_path / "checkpoints" / "step_00000001")
    monkeypatch.setattr(checkpoint, failing, no_space)
    for name in ("step_00000001", "step_00000002"):
        with pytest.raises(CheckpointError, match=f"Could not save checkpoint .*{name}: No space left on device"):
            write(tmp_path / "checkpoints" / name, 2)
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == ["step_00000001"]
    assert checkpoint.read_state(find_checkpoint(tmp_path))["step"] == 1


def test_failed_rename_keeps_the_checkpoint_it_would_have_replaced(tmp_path, monkeypatch):
    write(tmp_path / "c", 1)
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: no_space() if "replaced" not in f"{self}{to}" else rename(self, to)
    )
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "c", 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["c"]
    assert checkpoint.read_state(tmp_path / "c")["step"] == 1


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The system refuses to let a file grow beyond 100 kB: to the writer the same as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refusal_of_the_system_is_a_clear_error(tmp_path, small_files_only):
    write(tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"Could not save checkpoint .*after: .*File too large"):
        write_checkpoint(tmp_path / "after", {"weight": torch.zeros(100_000)}, {}, {})
    assert names(tmp_path) == ["before"]


def test_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        write(tmp_path / "checkpoints" / checkpoint.step_name(step), step)
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]
    assert names(tmp_path / "checkpoints") == ["step_00000009", "step_00000010"]


def test_remains_of_a_killed_process_are_removed_and_never_read(tmp_path):
    write(tmp_path / "checkpoints" / "step_00000001")
    (tmp_path / "checkpoints" / ".unfinished-step_00000002-77").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    checkpoint.remove_unfinished(tmp_path)
    assert names(tmp_path / "checkpoints") == ["step_00000001"]


@pytest.fixture
def saved(model, train_config, batch, tmp_path) -> Path:
    trainer = Trainer(model, train_config)
    trainer.step(*batch())
    return trainer.save(tmp_path / "checkpoints" / "step_00000001")


def test_load_model_reads_run_and_checkpoint_directories(saved, model, tmp_path):
    for path in (tmp_path, saved, str(saved)):
        loaded = load_model(path)
        assert loaded.config == model.config
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_load_model_takes_another_clip_size(saved, model):
    loaded = load_model(saved, image_size=(64, 32), num_frames=8)
    assert loaded.config.grid == (4, 8, 4)
    assert torch.equal(loaded.encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_incomplete_checkpoint_names_the_missing_file(saved, tmp_path, name):
    (saved / name).unlink()
    for path in (saved, tmp_path):
        with pytest.raises(CheckpointError, match=f"step_00000001 is incomplete: it lacks {name}"):
            Trainer.resume(path)
        with pytest.raises(CheckpointError, match="is incomplete"):
            load_model(path)


def test_nothing_there_says_where_it_looked(tmp_path):
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*nowhere: expected a run or checkpoint directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors.* nor checkpoints/step_\* below it"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_truncated_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"Cannot read .*{name}"):
        Trainer.resume(saved)


@pytest.mark.parametrize(
    ("key", "value"), [("random", None), ("step", None), ("extra", None), ("random", [{"python": [3, [], None]}])]
)
def test_damaged_state_is_refused(saved, key, value):
    state = json.loads((saved / "state.json").read_text())
    if value is None:
        del state[key]
    else:
        state[key] = value
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="is damaged"):
        Trainer.resume(saved)


def test_files_are_as_readable_as_the_system_wants(tmp_path):
    before = os.umask(0o022)
    try:
        path = write(tmp_path / "c")
    finally:
        os.umask(before)
    assert {(path / name).stat().st_mode & 0o777 for name in checkpoint.FILES} == {0o644}


def test_newer_format_is_refused(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 2"):
        load_model(saved)


def test_weights_of_another_architecture_are_listed(saved):
    with pytest.raises(CheckpointError) as caught:
        load_model(saved, depth=3, predictor_embed_dim=32)
    message = str(caught.value)
    assert "missing encoder.blocks.2.norm1.weight (48,)" in message
    assert "misshapen predictor.predictor_embed.weight: expected (32, 48), got (24, 48)" in message
    with pytest.raises(CheckpointError, match=r"unexpected encoder.blocks.1.norm1.weight"):
        load_model(saved, depth=1)


def test_renamed_weight_is_missing_and_unexpected(saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors["encoder.norm.scale"] = tensors.pop("encoder.norm.weight")
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 keys differ: missing encoder.norm.weight.*unexpected encoder.norm.scale"
    ):
        load_model(saved)


def test_optimizer_of_another_architecture_is_listed(saved):
    tensors = safetensors.torch.load_file(saved / "optimizer.safetensors")
    tensors["exp_avg.encoder.norm.bias"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, saved / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors does not fit .* exp_avg.encoder.norm.bias"):
        Trainer.resume(saved)
