import re

import pytest

from vjepa import demo
from vjepa.cli import CommandError

SMALL = ["--clips", "16", "--labels", "8", "--probes", "2", "--test-clips", "8", "--steps", "2"]


def test_small_demo_writes_clips_run_probes_and_report(tmp_path, capsys):
    code = demo.main(["--dir", str(tmp_path / "demo"), *SMALL])
    output = capsys.readouterr().out
    accuracy = {
        name: float(re.search(rf"^{name} +([\d.]+)%", output, re.M)[1]) for name in ("random", "pretrained", "chance")
    }
    assert accuracy["chance"] == 12.5
    assert code == (0 if accuracy["pretrained"] > accuracy["random"] else 1)
    assert len(list((tmp_path / "demo" / "clips").rglob("*.mp4"))) == 24
    report = (tmp_path / "demo" / "report.html").read_text()
    for text in ("Attentive probe", "Masks over frames", "PCA of features over frames", "Target spread", "12.5%"):
        assert text in report
    assert not re.search(r"""(?:src|href)=["']?https?:""", report)


def test_an_earlier_demo_is_left_alone(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.html").write_text("mine")
    assert demo._fresh_directory(tmp_path / "demo").name == "demo-2"
    assert demo._fresh_directory(tmp_path / "demo-3").name == "demo-3"


@pytest.mark.parametrize(("option", "value"), [("--clips", "0"), ("--probes", "-1"), ("--labels", "600")])
def test_impossible_counts_are_refused_by_name(option, value, capsys):
    with pytest.raises(SystemExit):
        demo.main([option, value])
    assert "expected at least" in capsys.readouterr().err


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(CommandError, match=r"nowhere\.yaml"):
        demo.main(["--dir", str(tmp_path / "demo"), "--config", str(tmp_path / "nowhere.yaml")])
