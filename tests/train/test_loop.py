"""Whole runs: what they write, how they resume, and what stops them."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from vjepa import VJEPA
from vjepa.checkpoint import CheckpointError, list_checkpoints, load_model
from vjepa.data import DataError
from vjepa.train import NonFiniteError, RunError, Trainer, pretrain
from vjepa.train.guard import load_batch

TIMES = ("clips_per_s", "data_wait_s", "compute_s")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(directory: Path) -> list[dict]:
    """The metrics of a run without its clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(directory / "metrics.jsonl")]


def assert_same_run(first: Path, second: Path) -> None:
    """Same metrics, and the same bytes in the newest checkpoint (whose run section may differ)."""
    assert numbers(first) == numbers(second)
    ours, theirs = list_checkpoints(first)[-1], list_checkpoints(second)[-1]
    assert ours.name == theirs.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = safetensors.torch.load_file(ours / name), safetensors.torch.load_file(theirs / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((ours / "state.json").read_text()) == json.loads((theirs / "state.json").read_text())


def wait_for_step(directory: Path, step: int, process) -> None:
    deadline = time.monotonic() + 60
    path = directory / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_run_writes_metrics_checkpoints_and_configuration(run_config):
    config = run_config(run={"tensorboard": True, "log_every": 5}, train={"steps": 11})
    result = pretrain(config)
    directory = Path(config.run.dir)
    assert (result.steps_done, result.exit_code) == (11, 0)
    metrics = lines(directory / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 5, 10, 11]
    assert metrics[-1].keys() == {
        "step", "loss", "lr", "weight_decay", "momentum", "grad_norm_encoder", "grad_norm_predictor",
        "target_std", "effective_rank", "predictor_variance", "bad_files", "skipped_clips", *TIMES,
    }  # fmt: skip
    assert metrics[-1] == result.metrics
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert all(line["data_wait_s"] > 0 and line["compute_s"] > 0 and line["clips_per_s"] > 0 for line in metrics)
    assert [path.name for path in list_checkpoints(directory)] == ["step_00000008", "step_00000011"]
    assert json.loads((directory / "config.json").read_text()) == config.to_dict()
    assert list((directory / "tensorboard").iterdir())
    assert isinstance(load_model(directory), VJEPA)


def test_resumed_run_equals_the_uninterrupted_one(run_config):
    whole, parts = run_config("whole"), run_config("parts", train={"steps": 6})
    pretrain(whole)
    pretrain(parts)
    (Path(parts.run.dir) / "metrics.jsonl").open("a").write('{"step": 7, "loss": 1}\n{"step": 8, "lo')
    pretrain(run_config("parts", run={"resume": True}))
    assert_same_run(Path(parts.run.dir), Path(whole.run.dir))


def test_killed_run_equals_the_uninterrupted_one_after_resume(run_config, start_run):
    workers = {"num_workers": 1, "start_method": "fork"}
    whole, killed = run_config("whole"), run_config("killed", data=workers)
    pretrain(whole)
    process = start_run(killed)
    wait_for_step(Path(killed.run.dir), 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list_checkpoints(killed.run.dir)[-1].name in ("step_00000004", "step_00000008")
    pretrain(run_config("killed", data={"num_workers": 0}, run={"resume": True}))
    assert_same_run(Path(killed.run.dir), Path(whole.run.dir))


def test_run_killed_before_its_first_checkpoint_starts_again(run_config):
    whole, early = run_config("whole"), run_config("early")
    pretrain(whole)
    directory = Path(early.run.dir)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(early.to_dict()))
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    pretrain(run_config("early", run={"resume": True}))
    assert_same_run(directory, Path(whole.run.dir))


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_saves_and_ends(run_config, monkeypatch, capsys, number, exit_code):
    config = run_config()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    send_in_step(monkeypatch, 6, number)
    result = pretrain(config)
    assert (result.steps_done, result.signal, result.exit_code) == (6, number, exit_code)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert list_checkpoints(config.run.dir)[-1].name == "step_00000006"
    assert f"stopped by signal {int(number)}; saved after step 6" in capsys.readouterr().out
    monkeypatch.undo()
    whole = run_config("whole")
    pretrain(whole)
    pretrain(run_config(run={"resume": True}))
    assert_same_run(Path(config.run.dir), Path(whole.run.dir))


def test_second_ctrl_c_ends_at_once(run_config, monkeypatch):
    config = run_config()
    send_in_step(monkeypatch, 6, signal.SIGINT, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits "ignore"
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list_checkpoints(config.run.dir)[-1].name == "step_00000004"


def send_in_step(monkeypatch, number: int, *signals: int) -> None:
    """The process gets signals while it computes step `number`, from 1."""
    step = Trainer.step

    def interrupted(self, *arguments, **options):
        if self.steps_done + 1 == number:
            for each in signals:
                signal.raise_signal(each)
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_that_reaches_the_workers_too_ends_cleanly(run_config, start_run, number, exit_code, start_method):
    workers = {"num_workers": 1, "start_method": start_method}
    config = run_config(train={"total_steps": 10_000}, run={"checkpoint_every": 10_000}, data=workers)
    process = start_run(config)
    wait_for_step(Path(config.run.dir), 3, process)
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C and a batch system's SIGTERM do
    output = process.communicate(timeout=60)[0]
    assert process.returncode == exit_code, output
    assert "Traceback" not in output
    done = lines(Path(config.run.dir) / "metrics.jsonl")[-1]["step"]
    assert list_checkpoints(config.run.dir)[-1].name == f"step_{done:08d}"


def test_directory_that_holds_a_run_is_refused(run_config):
    config = run_config(train={"steps": 1})
    pretrain(config)
    before = (Path(config.run.dir) / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=r"already holds a run: continue it with run.resume"):
        pretrain(run_config(train={"steps": 1}))
    assert (Path(config.run.dir) / "metrics.jsonl").read_text() == before


def test_a_run_that_failed_before_its_first_step_can_be_started_again(run_config, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.npy").write_bytes(b"no array")
    with pytest.raises(DataError):
        pretrain(run_config(data={"path": str(tmp_path / "broken")}))
    with pytest.raises(ValueError, match=r"train\.device"):
        pretrain(run_config(train={"device": "cuda:99"}))
    assert pretrain(run_config(train={"steps": 1})).steps_done == 1


def test_resume_with_nothing_left_to_do(run_config, capsys):
    pretrain(run_config(train={"steps": 2}))
    assert pretrain(run_config(train={"steps": 2}, run={"resume": True})).steps_done == 2
    assert "resuming after step 2, which is the last one: nothing to do" in capsys.readouterr().out
    with pytest.raises(RunError, match="up to step 1: it is at step 2 already"):
        pretrain(run_config(train={"steps": 1}, run={"resume": True}))


def test_resume_takes_the_same_data_by_another_path(run_config, videos, tmp_path, monkeypatch):
    pretrain(run_config(train={"steps": 1}))
    monkeypatch.chdir(videos.parent)
    again = run_config(train={"steps": 2}, run={"resume": True}, data={"path": [videos.name]})
    assert pretrain(again).steps_done == 2
    other = run_config(train={"steps": 3}, run={"resume": True}, data={"path": str(tmp_path)})
    np.save(tmp_path / "other.npy", np.zeros((16, 40, 40, 3), np.uint8))
    with pytest.raises(RunError, match=r"data\.path was"):
        pretrain(other)


def test_a_checkpoint_that_no_run_saved_is_refused(run_config, model, train_config):
    pretrain(run_config(train={"steps": 1}))
    Trainer(model, train_config).save(list_checkpoints(run_config().run.dir)[-1])
    with pytest.raises(RunError, match="was not saved by a run"):
        pretrain(run_config(run={"resume": True}))


def test_resume_with_another_configuration_names_the_keys(run_config):
    pretrain(run_config(train={"steps": 1}))
    with pytest.raises(
        RunError, match=r"model.depth was 2, is now 3; run.seed was 0, is now 5; train.lr was 0.000625, is now 0.1"
    ):
        pretrain(run_config(train={"lr": 0.1}, model={"depth": 3}, run={"resume": True, "seed": 5}))
    changed = {"resume": True, "log_every": 2, "checkpoint_every": 7, "keep": 1}
    assert pretrain(run_config(train={"steps": 3, "accumulation_steps": 2}, run=changed)).steps_done == 3


def test_resume_of_another_architecture_or_incomplete_checkpoint_is_an_error(run_config):
    config = run_config(train={"steps": 1})
    pretrain(config)
    saved = list_checkpoints(config.run.dir)[-1]
    (saved / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks optimizer.safetensors"):
        pretrain(run_config(run={"resume": True}))


def test_bad_files_are_skipped_counted_and_logged_with_the_reason(run_config, videos, tmp_path, caplog):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "broken.npy").write_bytes(b"no array")
    config = run_config(data={"path": str(folder), "max_bad_share": 0.9})
    result = pretrain(config)
    bad = lines(Path(config.run.dir) / "bad_files.jsonl")
    assert [Path(line["path"]).name for line in bad] == ["broken.npy"]
    assert bad[0]["reason"]
    assert bad[0]["step"] >= 1
    assert result.metrics["bad_files"] == 1
    assert result.metrics["skipped_clips"] > 1
    assert f"skipped {bad[0]['path']}: {bad[0]['reason']}" in caplog.text


def test_only_bad_files_are_an_error(run_config, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.npy").write_bytes(b"no array")
    config = run_config(data={"path": str(folder), "judge_after": 2})
    with pytest.raises(DataError):
        pretrain(config)
    assert not list_checkpoints(config.run.dir)
    bad = lines(Path(config.run.dir) / "bad_files.jsonl")
    assert sorted(Path(line["path"]).name for line in bad) == ["0.npy", "1.npy", "2.npy"]


def test_too_many_bad_files_save_what_was_done_and_list_them(run_config, videos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.npy").symlink_to(next(videos.iterdir()))
    for number in range(4):
        (folder / f"{number}.npy").write_bytes(b"no array")
    config = run_config(data={"path": str(folder), "judge_after": 20, "max_bad_share": 0.1})
    with pytest.raises(DataError, match="more than max_bad_share"):
        pretrain(config)
    done = lines(Path(config.run.dir) / "metrics.jsonl")[-1]["step"]
    assert list_checkpoints(config.run.dir)[-1].name == f"step_{done:08d}"
    bad = lines(Path(config.run.dir) / "bad_files.jsonl")
    assert sorted(Path(line["path"]).name for line in bad) == ["0.npy", "1.npy", "2.npy", "3.npy"]


def test_non_finite_step_names_clips_and_can_be_reproduced(run_config, monkeypatch):
    config = run_config()
    step = Trainer.step

    def poisoned(self, video, masks, **options):
        if self.steps_done == 5:
            with torch.no_grad():
                self.model.predictor.predictor_proj.bias[3] = math.inf
        return step(self, video, masks, **options)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(NonFiniteError, match=r"Step 5 is not finite .*Clips of the batch: .*video\d.npy") as caught:
        pretrain(config)
    monkeypatch.undo()
    bundle = caught.value.bundle
    assert bundle == Path(config.run.dir) / "nonfinite" / "step_00000005"
    report = json.loads((bundle / "report.json").read_text())
    assert report["step"] == 5
    assert len(report["clips"]) == 4
    assert report["values"]["loss"] in ("inf", "nan")
    with pytest.raises(NonFiniteError, match="Step 5 is not finite"):
        Trainer.resume(bundle / "checkpoint").step(*load_batch(bundle))


def test_forced_collapse_sets_off_the_alarm_and_can_stop_the_run(run_config, caplog):
    collapsing = {"total_steps": 400, "warmup_steps": 0, "lr": 3e-2, "momentum": (0.5, 0.5), "weight_decay": 0.4}
    config = run_config(train=collapsing, run={"stop_on_collapse": True})
    result = pretrain(config)
    assert result.collapsed
    assert result.exit_code == 3
    assert result.steps_done < 400
    assert "Collapse: " in caplog.text
    events = [line for line in lines(Path(config.run.dir) / "metrics.jsonl") if "event" in line]
    assert {event["event"] for event in events} == {"collapse"}
    assert events[-1]["step"] == result.steps_done
    assert list_checkpoints(config.run.dir)[-1].name == f"step_{result.steps_done:08d}"


def test_full_disk_ends_the_run_and_keeps_the_checkpoint_before(run_config, monkeypatch):
    import errno

    from vjepa import checkpoint

    config = run_config()
    flush = checkpoint._flush

    def full_at_step_8(path):
        if "step_00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", full_at_step_8)
    with pytest.raises(CheckpointError, match="step_00000008: No space left on device"):
        pretrain(config)
    monkeypatch.undo()
    assert [path.name for path in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step_00000004"]
    whole = run_config("whole")
    pretrain(whole)
    pretrain(run_config(run={"resume": True}))
    assert_same_run(Path(config.run.dir), Path(whole.run.dir))


def test_a_run_from_before_a_setting_existed_is_resumed(run_config, monkeypatch):
    """What config.json lacks had its default."""
    config = run_config(train={"steps": 2})
    pretrain(config)
    path = Path(config.run.dir) / "config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["target_graph"], saved["data"]["decoder"]
    path.write_text(json.dumps(saved))
    assert pretrain(run_config(train={"steps": 3}, run={"resume": True})).steps_done == 3
