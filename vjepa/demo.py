"""The whole product in a few minutes on two CPU cores: `make demo`, or `python -m vjepa.demo`.

 1 writes small labelled H.264 clips (vjepa.data.motion): the label is how things move, a single frame does not show it
 2 pretrains a small V-JEPA on them, without the labels, exactly as `vjepa pretrain` does
 3 trains the same attentive probe on the frozen features of that encoder and of a randomly initialised one
 4 prints both accuracies beside chance, and writes one HTML report

Every number printed is measured in that run; the exit code is 1 if pretraining did not beat random features.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from torch import Tensor

from vjepa.cli import CommandError
from vjepa.cli_masks import kind_names
from vjepa.cli_pretrain import read_config
from vjepa.data import Video, find_videos, iterate_clips
from vjepa.data.motion import CLASSES, write_motion_clips
from vjepa.masks import mask_generator
from vjepa.model import VJEPA, Encoder
from vjepa.probe import accuracy, fit_probe
from vjepa.report import Figure, Table, write_report
from vjepa.train.config import PretrainConfig
from vjepa.train.loop import pretrain
from vjepa.visualize import mask_figure, pca_figure

PROBE_EPOCHS = 250  # the training loss is then near zero on either kind of feature
PROBE_LR = 3e-3
PROBE_BATCH = 32
FEATURE_BATCH = 32
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "demo.yaml"  # of the source tree
RANDOM_SEED_OFFSET = 1000  # the random encoder is drawn apart from the one that was pretrained


@dataclass(frozen=True)
class ProbeScore:
    """Accuracies (0..1) of one encoder's probes, a number for each."""

    name: str
    train: tuple[float, ...]
    test: tuple[float, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0 when the pretrained features beat the random ones, else 1."""
    options = _options(argv)
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    folder = _fresh_directory(Path(options.dir))
    config = _config(options, folder)

    console.rule("1/4  motion clips", align="left")
    train, test = _clips(folder / "clips", options, console)

    console.rule(f"2/4  pretraining on {len(train)} clips, labels unused", align="left")
    result = pretrain(config)
    if result.exit_code:
        return result.exit_code

    console.rule("3/4  attentive probes on frozen features", align="left")
    from vjepa import load_pretrained

    pretrained = load_pretrained(result.dir).eval()
    torch.manual_seed(options.seed + RANDOM_SEED_OFFSET)
    untrained = VJEPA(pretrained.config).eval()
    train_set = _read(train[: options.labels * options.probes], config, pretrained)
    test_set = _read(test, config, pretrained)
    scores = []
    for name, model in (("random", untrained), ("pretrained", pretrained)):
        scores.append(_probe(name, model.target_encoder, train_set, test_set, options, console))
    _print_scores(scores, console)

    console.rule("4/4  report", align="left")
    report = _report(folder, config, pretrained, scores, test_set, options.labels, time.monotonic() - began)
    console.print(f"{report}  (open it in a browser)\nfinished in {time.monotonic() - began:.0f} s", markup=False)
    better = mean(scores[1].test) > mean(scores[0].test)
    if not better:
        print("vjepa.demo: the pretrained features did not beat the random ones in this run", file=sys.stderr)
    return 0 if better else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vjepa.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="runs/demo", help="where to write; a new name if taken (default: %(default)s)")
    parser.add_argument("--config", help="pretraining configuration (default: configs/pretrain/demo.yaml)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as the configuration says)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, weights and masks (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=768, help="clips to pretrain on (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=32, help="labelled clips of each probe (default: %(default)s)")
    parser.add_argument("--test-clips", type=int, default=256, help="clips to test probes on (default: %(default)s)")
    parser.add_argument(
        "--probes",
        type=int,
        default=6,
        help="probes per encoder, each on labelled clips of its own (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    for name in ("clips", "labels", "test_clips", "probes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.labels * options.probes > options.clips:
        parser.error(
            f"--clips: expected at least labels x probes = {options.labels * options.probes}, got {options.clips}"
        )
    return options


def _fresh_directory(wanted: Path) -> Path:
    """`wanted`, or wanted-2, wanted-3 ...: a demo never writes over an earlier one."""
    number, folder = 1, wanted
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _config(options: argparse.Namespace, folder: Path) -> PretrainConfig:
    file = Path(options.config) if options.config else CONFIG
    if not file.is_file():
        raise CommandError(f"--config: expected a YAML file, found none at {file}")
    overrides = {"data.path": folder / "clips" / "train", "run.dir": folder / "run", "run.seed": options.seed}
    if options.steps is not None:
        overrides["train.steps"] = options.steps
    return read_config(["--config", str(file), *(f"--{key}={value}" for key, value in overrides.items())])


def _clips(folder: Path, options: argparse.Namespace, console: Console) -> tuple[list[Video], list[Video]]:
    """Writes both sets of clips and returns them with their labels; no texture or path of one occurs in the other."""
    began = time.monotonic()
    videos = []
    for name, count, seed in (
        ("train", options.clips, 2 * options.seed),
        ("test", options.test_clips, 2 * options.seed + 1),
    ):
        with console.status(f"writing {count} {name} clips"):
            for _ in write_motion_clips(folder / name, count, seed=seed):
                pass
        videos.append(find_videos(folder / name / "labels.csv"))
    seconds = time.monotonic() - began
    console.print(
        f"{len(videos[0])} + {len(videos[1])} clips of {len(CLASSES)} kinds of motion in {folder} ({seconds:.0f} s)"
    )
    return videos[0], videos[1]


def _read(videos: Sequence[Video], config: PretrainConfig, model: VJEPA) -> tuple[Tensor, Tensor]:
    """The middle of each video: uint8 [N,C,T,H,W], labels int64 [N]."""
    clips = list(
        iterate_clips(
            videos,
            model.config.num_frames,
            model.config.image_hw,
            frame_stride=config.data.frame_stride,
            fps=config.data.fps,
            num_workers=config.data.num_workers,
        )
    )
    return torch.stack([clip.video for clip in clips]), torch.tensor([clip.label for clip in clips])


@torch.no_grad()
def _features(encoder: Encoder, video: Tensor) -> Tensor:
    """Features [N,L,D] of whole clips."""
    return torch.cat([encoder(part) for part in video.split(FEATURE_BATCH)])


def _probe(
    name: str,
    encoder: Encoder,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    console: Console,
) -> ProbeScore:
    """Probes of one encoder, the same in everything but the features they read."""
    train_features, test_features = _features(encoder, train[0]), _features(encoder, test[0])
    fits, hits = [], []
    parts = zip(train_features.split(options.labels), train[1].split(options.labels), strict=True)
    for seed, (features, labels) in enumerate(parts):
        with console.status(f"{name} features: probe {seed + 1} of {options.probes}"):
            result = fit_probe(
                features,
                labels,
                num_classes=len(CLASSES),
                num_heads=encoder.config.num_heads,
                epochs=PROBE_EPOCHS,
                batch_size=PROBE_BATCH,
                lr=PROBE_LR,
                seed=seed,
            )
            fits.append(result.train_accuracy)
            hits.append(accuracy(result.probe, test_features, test[1]))
        console.print(
            f"{name} features, probe {seed + 1}: {hits[-1]:.1%} of test clips, {fits[-1]:.1%} of training clips"
        )
    return ProbeScore(name, tuple(fits), tuple(hits))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%} +- {stdev(values):.1%}" if len(values) > 1 else f"{values[0]:.1%}"


def _print_scores(scores: Sequence[ProbeScore], console: Console) -> None:
    console.print(f"\n{'encoder':<12}{'test accuracy':>18}{'training':>18}")
    for score in scores:
        console.print(f"{score.name:<12}{_spread(score.test):>18}{_spread(score.train):>18}")
    console.print(f"{'chance':<12}{1 / len(CLASSES):>18.1%}\n")


def _report(
    folder: Path,
    config: PretrainConfig,
    model: VJEPA,
    scores: Sequence[ProbeScore],
    test: tuple[Tensor, Tensor],
    labelled: int,
    seconds: float,
) -> Path:
    """The HTML report of the run, with masks, PCA pictures and the probes' table."""
    grid = model.config.grid
    shown = test[0][: len(CLASSES)]  # the classes take turns: one clip of each
    sampler = config.masks.build(grid, model.config.tubelet_size)
    masks = sampler(1, mask_generator(config.run.seed, 0, 0))
    figures = [
        Figure(
            "Masks over frames",
            mask_figure(shown[0], masks, grid, kinds=kind_names(config.masks)),
            "Clear: the context the encoder sees. Dark: the targets whose features are predicted.",
        ),
        Figure(
            "PCA of features over frames",
            pca_figure(shown, _features(model.target_encoder, shown), grid, labels=CLASSES, remove_position=True),
            "Features of the target encoder on test clips, one a kind of motion; the mean at each position is removed.",
        ),
    ]
    rows = [(score.name, _spread(score.test), _spread(score.train)) for score in scores]
    table = Table(
        "Attentive probe on frozen features",
        ("encoder", "test accuracy", "training accuracy"),
        [*rows, ("chance", f"{1 / len(CLASSES):.1%}", "")],
        f"{labelled} labelled clips a probe, {len(test[1])} test clips, {len(CLASSES)} kinds of motion; mean and standard "
        f"deviation over {len(scores[0].test)} probes with labelled clips of their own, one pretraining run.",
        best=max(range(len(scores)), key=lambda row: mean(scores[row].test)),
    )
    return write_report(
        folder / "report.html",
        folder / "run",
        figures,
        [table],
        title="V-JEPA on motion clips",
        summary="A small V-JEPA, pretrained without labels on generated clips and probed for how things move.",
        highlights={f"probe accuracy, {score.name}": f"{mean(score.test):.1%}" for score in scores},
        facts={"Seconds until this report": f"{seconds:.0f}"},
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, RuntimeError, ValueError, OSError) as error:
        sys.exit(f"vjepa.demo: {error}")
