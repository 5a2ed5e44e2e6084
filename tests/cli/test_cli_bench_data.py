"""`vjepa bench data` as a user runs it."""

import json
import re

import av
import numpy as np
import pytest

from vjepa.cli import main


@pytest.fixture
def videos(tmp_path):
    """A folder of two short videos and one file that is none."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(2):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "bf": "2"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for index in range(60):
                image = np.full((240, 320, 3), 3 * index + number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    (folder / "text.mp4").write_text("no video")
    return folder


SMALL = ["--clips", "4", "--num_frames", "8", "--image_size", "64", "--frame_stride", "2"]


def test_the_report(videos, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["bench", "data", str(videos), *SMALL, "--step_ms", "250", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "4 clips of 8 x 64 x 64, one frame in 2, from 2 files (0." in out
    for row in ("open, close", "seek", "read packets", "decode", "crop, resize, colour", "collate"):
        assert re.search(rf"^  {row} +\d+\.\d\d ms +\d+%$", out, re.M), row
    rate = float(re.search(r"^one worker, one thread +([\d.]+) clips/s", out, re.M)[1])
    needed = re.search(r"a step of 250 ms with 24 clips needs (\d+) workers?: 24 / \(0\.25 s x ([\d.]+) clips/s\)", out)
    assert float(needed[2]) == rate and int(needed[1]) == pytest.approx(24 / (0.25 * rate), abs=1.01)
    assert re.search(r"^naive PyAV loop +[\d.]+ clips/s of processor time; ours is [\d.]+x as fast \(same", out, re.M)
    assert re.search(r"^1 bad file skipped\n  .*text\.mp4: Invalid data found", out, re.M)
    figures = json.loads(file.read_text())
    assert figures["options"]["step_ms"] == 250 and figures["clips"] == 4
    assert figures["rate"] == pytest.approx(rate, abs=0.06)
    assert figures["ratio"] == pytest.approx(figures["naive"] / figures["ours"])


def test_without_a_step_the_formula_is_told_and_workers_are_timed(videos, capsys):
    assert main(["bench", "data", str(videos / "0.mp4"), *SMALL, "--workers", "1", "--batch_size", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^workers for a step of X ms with 3 clips: 3 / \(X/1000 s x [\d.]+ clips/s\), rounded up$", out, re.M
    )
    assert re.search(r"^1 worker process +[\d.]+ clips/s", out, re.M)
    assert "no bad files met" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: PATH"),
        (["{missing}"], "data path does not exist: "),
        (["{empty}"], "no video found in "),
        (["{bad}"], "no readable video in "),
        (["{videos}", "--clips", "0"], "--clips: expected at least 1, got 0"),
        (["{videos}", "--clips", "many"], "argument --clips: invalid int value: 'many'"),
        (["{videos}", "--workers", "-1"], "--workers: expected at least 0, got -1"),
        (["{videos}", "--step_ms", "0"], "--step_ms: expected a time above 0 ms, got 0"),
        (
            ["{videos}", "--decoder", "decord"],
            "--decoder: expected one of pyav, torchcodec, torchcodec:cuda, got 'decord'",
        ),
        (["{videos}", "--json", "{missing}/a.json"], "--json: no folder "),
        (["{videos}", "--clisp", "3"], "unrecognized arguments: --clisp 3"),
    ],
)
def test_wrong_input_gets_one_sentence(arguments, words, videos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"missing": tmp_path / "none", "empty": tmp_path / "empty", "bad": videos / "text.mp4", "videos": videos}
    given = [argument.format(**places) for argument in arguments]
    assert main(["bench", "data", *given]) in (1, 2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("vjepa bench: error: ")
    assert words in said.err and said.err.count("\n") == 1


def test_help_names_units_and_defaults(capsys):
    assert main(["bench", "data", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "default: 48",
        "default: 224 pixels",
        "default: 24",
        "time of a training step in ms",
        "default: pyav",
    ):
        assert words in text
