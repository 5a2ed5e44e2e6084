"""`vjepa pretrain`: a configuration, a run directory, a trained V-JEPA."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from vjepa.cli import CommandError
from vjepa.cli_config import build_parser, parse
from vjepa.train.config import PretrainConfig

DESCRIPTION = (
    "Pretrain a V-JEPA on videos. Give a configuration and where the videos are, for example: "
    "vjepa pretrain --config configs/pretrain/demo.yaml --data.path my_videos --run.dir runs/mine. "
    "Several folders or manifests: --data.path A B, or --data.sources '[{path: A, weight: 3}, {path: B}]'"
)


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; returns the exit code."""
    config = read_config(argv)
    require_filled_in(config)
    from vjepa.train.loop import pretrain

    return pretrain(config).exit_code


def read_config(argv: Sequence[str]) -> PretrainConfig:
    """The configuration that these arguments of `vjepa pretrain` mean; UsageError for one it cannot take."""
    parser = build_parser("pretrain", DESCRIPTION, PretrainConfig)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run.dir; the same as --run.resume true"
    )
    namespace = parse(parser, argv, PretrainConfig)
    namespace.run.resume = namespace.run.resume or namespace.resume
    path_wins(namespace, argv)
    built = parser.instantiate(namespace)
    return PretrainConfig(**{name: built[name] for name in PretrainConfig.__dataclass_fields__})


def path_wins(namespace: Namespace, argv: Sequence[str]) -> None:
    """--data.path on the command line replaces the sources of a file, as options win over files."""
    named = {argument.partition("=")[0].rstrip("+") for argument in argv}
    if "--data.path" in named and "--data.sources" not in named:
        namespace.data.sources = []


def require_filled_in(config: PretrainConfig) -> None:
    """CommandError where sources of the configuration are still the <placeholders> of a published recipe."""
    unfilled = [
        f"data.sources[{number}].path ({source.path})"
        for number, source in enumerate(config.data.sources)
        if source.path[:1] == "<"
    ]
    if unfilled:
        raise CommandError(
            f"the sources are placeholders; fill in {', '.join(unfilled)} in a copy of the configuration, "
            "each with a folder of videos or a manifest."
        )
