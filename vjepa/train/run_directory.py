"""The run directory: who may write into it, and whether a resumed run is still the same run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

from vjepa.checkpoint import list_checkpoints, remove_unfinished
from vjepa.train.config import PretrainConfig
from vjepa.train.plain import flatten, to_plain
from vjepa.train.records import RunError

CONFIG_FILE, METRICS_FILE, BAD_FILES_FILE = "config.json", "metrics.jsonl", "bad_files.jsonl"
MAY_CHANGE = (
    "run",
    "train.steps",
    "train.device",
    "train.accumulation_steps",
    "train.activation_checkpointing",
    "train.target_graph",
    "data.num_workers",
    "data.prefetch",
    "data.start_method",
    "data.clip_timeout",
    "data.max_bad_share",
    "data.judge_after",
)
MUST_STAY = ("run.seed",)


def open_run_directory(config: PretrainConfig) -> None:
    """Makes or checks the run directory, and writes config.json, in which the paths of data are absolute.

    Raises:
        RunError: It holds a run and run.resume is false; it is to be resumed with other settings (names the keys); it
            cannot be written.
    """
    directory = Path(config.run.dir)
    holds_run = any((directory / name).exists() for name in (CONFIG_FILE, METRICS_FILE))
    holds_run = holds_run or bool(list_checkpoints(directory))
    if holds_run and not config.run.resume:
        raise RunError(
            f"{directory} already holds a run: continue it with run.resume (--resume), "
            "or give run.dir another directory."
        )
    path, given = directory / CONFIG_FILE, _with_absolute_paths(config.to_dict())
    try:
        if holds_run:
            if not path.is_file():
                raise RunError(f"Cannot resume {directory}: it lacks {CONFIG_FILE}.")
            _check_same_run(json.loads(path.read_text(encoding="utf-8")), given, directory)
            remove_unfinished(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(given, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"Cannot write {directory}: {error.strerror}.") from error
    except ValueError as error:
        raise RunError(f"Cannot resume {directory}: {CONFIG_FILE} is not valid JSON ({error}).") from error


def forget_empty_run(run_dir: str | os.PathLike[str]) -> None:
    """Removes config.json and the empty metrics of a run that failed before its first line of metrics.

    Nothing is lost with them, and what made it fail (a wrong path, a missing device) can be set right and tried again
    in the same directory.
    """
    directory = Path(run_dir)
    metrics = directory / METRICS_FILE
    if not list_checkpoints(directory) and not (metrics.exists() and metrics.stat().st_size):
        metrics.unlink(missing_ok=True)
        (directory / CONFIG_FILE).unlink(missing_ok=True)


def _with_absolute_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """The same data is the same run, wherever it is resumed from."""
    data = dict(tree["data"])
    if data["path"] is not None:
        paths = [data["path"]] if isinstance(data["path"], str) else data["path"]
        data["path"] = [_absolute(path) for path in paths] if len(paths) > 1 else _absolute(paths[0])
    data["sources"] = [{**source, "path": _absolute(source["path"])} for source in data["sources"]]
    return {**tree, "data": data}


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_same_run(saved: dict[str, Any], given: dict[str, Any], directory: Path) -> None:
    before, now = flatten(_with_absolute_paths(saved)), flatten(given)
    for key, value in _defaults().items():
        before.setdefault(key, value)  # a setting that is younger than the run
    differing = [
        key for key in sorted(before.keys() | now.keys()) if not _may_change(key) and before.get(key) != now.get(key)
    ]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in differing)
        raise RunError(f"Cannot resume {directory} with another configuration: {changes}.")


def _defaults() -> dict[str, Any]:
    """Dotted keys of all settings that have a plain default."""
    found: dict[str, Any] = {}
    for section, kind in get_type_hints(PretrainConfig).items():
        for setting in dataclasses.fields(kind):
            if setting.default is not dataclasses.MISSING:
                found[f"{section}.{setting.name}"] = to_plain(setting.default)
    return found


def _may_change(key: str) -> bool:
    if key in MUST_STAY:
        return False
    return any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)
