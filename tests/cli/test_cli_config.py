"""Configurations: files and options, and what a wrong key, type or file is answered."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from vjepa.cli import UsageError, main
from vjepa.cli_config import build_parser, check_keys, dotted_keys, nearest_key, parse, split_config_files, type_name


@dataclass
class Source:
    """One source.

    Args:
        path: where
        weight: share
    """

    path: str
    weight: float = 1.0


@dataclass
class Data:
    """Data.

    Args:
        path: where
        sources: many
        size: pixels
        flip: mirror
        kinds: pairs
    """

    path: str | None = None
    sources: list[Source] = field(default_factory=list)
    size: int | tuple[int, int] = 224
    flip: bool = True
    kinds: tuple[tuple[int, float], ...] = ((8, 0.15),)


@dataclass
class Train:
    """Optimisation.

    Args:
        steps: how many
        lr: peak
        precision: of numbers
    """

    steps: int
    lr: float = 1e-3
    precision: Literal["bf16", "fp32"] = "fp32"


@dataclass
class Whole:
    """All.

    Args:
        train: optimisation
        data: videos
    """

    train: Train
    data: Data = field(default_factory=Data)


def parsed(*argv):
    parser = build_parser("test", "A test.", Whole)
    return parser.instantiate(parse(parser, argv, Whole))


def refused(*argv) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(*argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


def test_a_file_and_options_make_a_tree_of_dataclasses(write):
    file = write("train: {steps: 3, lr: 5e-4}\ndata:\n  sources:\n  - {path: rel/a, weight: 2}\n  - {path: ../b}\n")
    config = parsed("--config", file, "--data.size", "[64, 32]", "--data.kinds", "[[2, 0.7]]", "--data.flip", "false")
    assert config.train == Train(steps=3, lr=5e-4)
    assert config.data.sources == [Source("rel/a", 2.0), Source("../b")], "relative paths stay as they were typed"
    assert config.data.size == (64, 32)
    assert config.data.kinds == ((2, 0.7),)
    assert config.data.flip is False


def test_options_win_over_files_wherever_they_stand(write):
    first, second = write("train: {steps: 1, lr: 0.1}"), write("train: {steps: 2}", "d.yaml")
    assert parsed("--train.steps", "7", "--config", first).train.steps == 7
    assert parsed("--config", first, f"--config={second}").train == Train(steps=2, lr=0.1)
    assert split_config_files(["--a", "--config=x", "b", "--config", "y"]) == (["x", "y"], ["--a", "b"])


def test_dotted_keys_in_a_file(write):
    assert parsed("--config", write("train.steps: 4\ndata.path: here")).data.path == "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {pth: 3}", "unknown key 'data.pth'; did you mean 'data.path'?"),
        ("lr: 3", "unknown key 'lr'; did you mean 'train.lr'?"),
        ("train: {learning_rate: 3}", "unknown key 'train.learning_rate'; did you mean 'train.lr'?"),
        ("trian: {lr: 3}", "unknown key 'trian'; did you mean 'train."),
        (
            "data: {sources: [{path: a}, {path: a, wieght: 2}]}",
            "unknown key 'data.sources[1].wieght'; did you mean 'data.sources[1].weight'?",
        ),
        ("data.pth: 1", "unknown key 'data.pth'; did you mean 'data.path'?"),
        ("3: 1", "unknown key '3'; did you mean "),
        ("train: {steps: many}", "train.steps: expected a whole number, got 'many'"),
        ("train: {steps: 1.5}", "train.steps: expected a whole number, got '1.5'"),
        ("train: {steps: 1, precision: fp16}", "train.precision: expected one of bf16, fp32, got 'fp16'"),
        ("train: {steps: 1}\ndata: {flip: maybe}", "data.flip: expected true or false, got 'maybe'"),
        ("train: {steps: 1}\ndata: {kinds: 3}", "data.kinds: expected a list [[a whole number, a number], ...], got "),
        ("data: 3", "data: expected keys and values, got 3"),
        ("- 1", "expected keys and values, got list"),
        ("data: {a: [}", "not valid YAML: "),
    ],
)
def test_a_wrong_file_names_itself_the_key_and_what_was_expected(text, message, write):
    file = write(text)
    answer = refused("--config", file)
    assert answer.startswith(f"{file}: ") and message in answer


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.pth", "x"], "unknown option '--data.pth'; did you mean '--data.path'?"),
        (["--data.pat", "x"], "unknown option '--data.pat'; did you mean '--data.path'?"),
        (["--debgu"], "unknown option '--debgu'; did you mean '--debug'?"),
        (["--pth=x"], "unknown option '--pth'; did you mean '--data.path'?"),
        (["--train.lr", "fast"], "--train.lr: expected a number, got 'fast'"),
        (["--train.lr=fast"], "--train.lr: expected a number, got 'fast'"),
        (
            ["--data.size", "[1, 2, 3]"],
            "--data.size: expected a whole number or [a whole number, a whole number], got ",
        ),
        (["--data", '{"pth": 3}'], "unknown key 'data.pth'; did you mean 'data.path'?"),
        (["stray"], "unexpected argument 'stray'; options start with --"),
        (["--config"], "--config: expected a YAML file, got nothing"),
        (["--config", "no/such.yaml"], "--config: no file 'no/such.yaml'"),
    ],
)
def test_a_wrong_option_names_itself_and_what_was_expected(argv, message):
    assert message in refused("--train.steps", "1", *argv)


def test_what_is_required_and_missing_is_named():
    assert refused() == "required and not given: train.steps; give them in a --config file or as options"


def test_a_type_error_is_blamed_on_the_last_file_that_has_the_key(write):
    good, bad = write("train: {steps: 1}"), write("train: {steps: x}", "bad.yaml")
    assert refused("--config", good, "--config", bad).startswith(f"{bad}: train.steps: ")
    assert refused("--config", good, "--train.steps", "x").startswith("--train.steps: ")


def test_an_empty_file_changes_nothing(write):
    assert parsed("--config", write("# nothing\n"), "--train.steps", "1").train == Train(steps=1)


def test_keys_and_types():
    keys = dotted_keys(Whole)
    assert list(keys) == [
        *("train.steps", "train.lr", "train.precision"),
        *("data.path", "data.sources", "data.size", "data.flip", "data.kinds"),
    ]
    assert type_name(keys["data.path"]) == "text or null"
    assert type_name(keys["data.sources"]) == "a list [{path, weight}, ...]"
    assert nearest_key("size", list(keys)) == "data.size"
    check_keys({"train": {"lr": 1}, "data": {"sources": []}}, Whole, "x")


def test_the_whole_command_answers_on_stderr_with_code_2(capsys):
    assert main(["pretrain", "--data.pth", "x"]) == 2
    err = capsys.readouterr().err
    assert err == "vjepa pretrain: error: unknown option '--data.pth'; did you mean '--data.path'?\n"
