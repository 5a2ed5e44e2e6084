"""Files and lines of a run while it goes."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from vjepa.train.progress import ProgressLine, format_seconds
from vjepa.train.records import BadFiles, JsonLines, RunError

METRICS = {"loss": 0.5, "clips_per_s": 12.0, "data_wait_s": 1.0, "compute_s": 3.0, "target_std": 0.6}


def test_lines_are_readable_at_once_and_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3):
        lines.write({"step": step})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    lines.close()
    resumed = JsonLines(path, 2)
    resumed.write({"step": 3, "again": True})
    resumed.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "\0\0\0\n", '{"step": 9}\n'])
def test_what_a_crash_left_is_cut_off(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail)
    JsonLines(path, 5).close()
    assert path.read_text() == '{"step": 1}\n'


def test_unwritable_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"Cannot write .*nowhere/metrics.jsonl: No such file"):
        JsonLines(tmp_path / "nowhere" / "metrics.jsonl")


def test_bad_files_are_written_once_and_counted_each_time(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    bad = BadFiles(path)
    for step, name in [(1, "a"), (2, "b"), (2, "a")]:
        bad.note(step, name, "moov atom not found")
    bad.close()
    assert (bad.files, bad.clips) == (2, 3)
    assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == ["a", "b"]
    resumed = BadFiles(path, steps_done=1, clips=1)
    assert (resumed.files, resumed.clips) == (1, 1)
    resumed.close()


def test_progress_is_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    progress = ProgressLine(10, 2, Console(file=out, width=200))
    progress.advance(3)
    progress.update(4, METRICS)
    progress.close()
    line = out.getvalue()
    assert line.startswith("step 4/10  loss 0.5000  12.0 clips/s  data wait 25 %  ETA 0:00:")
    assert line.endswith("  target std 0.60\n")
    assert line.count("\n") == 1


def test_progress_is_one_live_line_on_a_terminal():
    out = io.StringIO()
    progress = ProgressLine(10, 0, Console(file=out, width=120, force_terminal=True))
    progress.update(4, METRICS)
    progress.message("saved")
    progress.close()
    assert "4/10" in out.getvalue()
    assert "loss 0.5000" in out.getvalue()
    assert "saved" in out.getvalue()


def test_a_narrow_terminal_still_shows_the_step():
    out = io.StringIO()
    progress = ProgressLine(90_000, 0, Console(file=out, width=60, force_terminal=True))
    progress.update(4, METRICS)
    progress.close()
    assert "4/90000" in out.getvalue()


def test_durations():
    assert format_seconds(3723.4) == "1:02:03"
