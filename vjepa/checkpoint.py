"""Checkpoints: a directory of safetensors and JSON that is either whole or not there.

    <run>/checkpoints/step_00000020/model.safetensors      every weight, by parameter name
                                    optimizer.safetensors  step.<name>, exp_avg.<name>, exp_avg_sq.<name> of each
                                    state.json             step, configuration, random generators

A checkpoint is written into a temporary directory beside its place, every file and the directory are flushed to the
disk, and one rename puts it there: a crash, a kill or a full disk at any moment leaves the checkpoints of before
untouched. Loading is strict: a missing file, or a missing, unexpected or misshapen weight, is an error that lists them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vjepa.config import VJEPAConfig
from vjepa.model import VJEPA

FORMAT = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
CHECKPOINTS = "checkpoints"
_TEMPORARY = ".unfinished-"
_STEP_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with the reason in one sentence."""


def _safetensors() -> Any:
    """Imported where files are written or read: a step needs torch alone."""
    import safetensors.torch

    return safetensors


def step_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint directories of a run, oldest first."""
    folder = Path(run_dir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory `path` means: itself, or the newest one of the run directory it is.

    Raises:
        CheckpointError: Nothing there, or one of the three files of a checkpoint is missing; says where it looked.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"No checkpoint at {path}: expected a run or checkpoint directory, found {found}.")
    checkpoint = path
    if not any((path / name).exists() for name in FILES):
        saved = list_checkpoints(path)
        if not saved:
            raise CheckpointError(
                f"No checkpoint at {path}: neither {', '.join(FILES)} in it nor {CHECKPOINTS}/step_* below it."
            )
        checkpoint = saved[-1]
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise CheckpointError(f"Checkpoint {checkpoint} is incomplete: it lacks {', '.join(missing)}.")
    return checkpoint


def write_checkpoint(
    path: str | os.PathLike[str],
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint directory, whole or not at all; an older checkpoint of that name is replaced.

    Args:
        path: Where the checkpoint will be.
        model: Weights by name.
        optimizer: Optimizer tensors by name.
        state: JSON values.

    Raises:
        CheckpointError: The disk is full, the place is not writable or holds something that is no checkpoint. What was
            there stays.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / STATE_FILE).exists())):
        raise CheckpointError(f"Could not save checkpoint {path}: something that is not a checkpoint is in that place.")
    temporary = path.parent / f"{_TEMPORARY}{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write_files(temporary, model, optimizer, state)
        _move_into_place(temporary, path)
    except (OSError, _safetensors().SafetensorError) as error:
        raise CheckpointError(
            f"Could not save checkpoint {path}: {_reason(error)}. Checkpoints saved before are untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write_files(
    folder: Path, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    save_tensors(model, folder / MODEL_FILE)
    save_tensors(optimizer, folder / OPTIMIZER_FILE)
    (folder / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}, indent=1) + "\n", encoding="utf-8")
    mode = (folder / STATE_FILE).stat().st_mode  # safetensors makes files that only their owner can read
    for name in FILES:
        (folder / name).chmod(mode)
        _flush(folder / name)
    _flush(folder)


def _move_into_place(temporary: Path, path: Path) -> None:
    replaced = path.parent / f"{_TEMPORARY}replaced-{path.name}-{os.getpid()}"
    replaces = path.exists()
    if replaces:
        path.rename(replaced)
    try:
        temporary.rename(path)
    except OSError:
        if replaces:
            replaced.rename(path)
        raise
    _flush(path.parent)
    if replaces:
        shutil.rmtree(replaced)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors to one safetensors file, whatever their device and strides.

    Raises:
        OSError, safetensors.SafetensorError: The file cannot be written.
    """
    _safetensors().torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    try:
        return _safetensors().torch.load_file(path)
    except (OSError, _safetensors().SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {_reason(error)}.") from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads state.json of a checkpoint directory.

    Raises:
        CheckpointError: The file is missing, is no JSON object, or is of a newer format than this version knows.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {_reason(error)}.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"Cannot read {path}: expected checkpoint format {FORMAT}, got {found!r}.")
    return state


def remove_unfinished(run_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed process left of a checkpoint it was writing or removing."""
    folder = Path(run_dir) / CHECKPOINTS
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path)


def prune_checkpoints(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Removes all but the `keep` newest checkpoints of a run."""
    for path in list_checkpoints(run_dir)[:-keep]:
        doomed = path.parent / f"{_TEMPORARY}{path.name}-{os.getpid()}"
        path.rename(doomed)
        shutil.rmtree(doomed)


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str | os.PathLike[str]) -> None:
    """Copies `tensors` into a module's state; every name and every shape must agree.

    Raises:
        CheckpointError: Lists the missing, unexpected and misshapen names; the module is then unchanged.
    """
    expected = module.state_dict()
    problems = [f"missing {name} {tuple(tensor.shape)}" for name, tensor in expected.items() if name not in tensors]
    problems += [f"unexpected {name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name not in expected]
    problems += [
        f"misshapen {name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit this architecture, {len(problems)} keys differ: " + "; ".join(problems) + "."
        )
    module.load_state_dict(dict(tensors), strict=True)


def load_model(path: str | os.PathLike[str], **config_overrides: Any) -> VJEPA:
    """The model of a checkpoint, with its weights, on the CPU.

    Args:
        path: A run directory (its newest checkpoint is read), a checkpoint directory, or a released `.pth.tar` file.
        **config_overrides: Fields of VJEPAConfig that replace the saved ones, for example image_size.

    Raises:
        CheckpointError: No checkpoint there, an incomplete or unreadable one, or weights of another architecture.
        ValueError: An override that VJEPAConfig refuses.
    """
    if Path(path).is_file():
        from vjepa.released import load_released

        return load_released(path, **config_overrides)
    checkpoint = find_checkpoint(path)
    saved = read_state(checkpoint).get("model")
    if not isinstance(saved, dict):
        raise CheckpointError(f"Cannot read {checkpoint / STATE_FILE}: it does not describe a model.")
    try:
        saved_config = VJEPAConfig.from_dict(saved)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"Cannot use {checkpoint / STATE_FILE}: {error}.") from error
    model = VJEPA(VJEPAConfig.from_dict({**saved_config.to_dict(), **config_overrides}))
    load_strictly(model, load_tensors(checkpoint / MODEL_FILE), checkpoint / MODEL_FILE)
    return model
