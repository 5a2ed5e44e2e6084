"""`vjepa masks`: draws the masks of a configuration over a real clip and prints what they hide."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vjepa.cli import OK, CommandError
from vjepa.cli_config import build_parser, parse
from vjepa.cli_pretrain import path_wins, require_filled_in
from vjepa.config import VJEPAConfig
from vjepa.data import ClipError, DataConfig, DataError, find_videos, read_clip
from vjepa.masks import MaskConfig, mask_generator, mask_statistics
from vjepa.train.config import PretrainConfig
from vjepa.visualize import mask_figure, save_png

DESCRIPTION = (
    "Draw the masks of a configuration over a real clip: one row for each mask kind, context clear, targets dark. "
    "For example: vjepa masks --config configs/pretrain/demo.yaml --data.path clip.mp4 --out masks.png"
)


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; returns the exit code."""
    parser = build_parser("masks", DESCRIPTION, PretrainConfig)
    parser.add_argument("--out", default="masks.png", help="the picture to write, a PNG", metavar="FILE.png")
    parser.add_argument(
        "--draws", type=int, default=64, help="clips to draw masks for, at once as in a batch; the first one is shown"
    )
    parser.add_argument("--columns", type=int, default=6, help="time steps to show, evenly spread")
    parser.set_defaults({"train.total_steps": 1, "train.warmup_steps": 0, "run.dir": "unused"})
    namespace = parse(parser, argv, PretrainConfig)
    path_wins(namespace, argv)
    config = parser.instantiate(namespace)
    if config.draws < 1:
        raise CommandError(f"--draws: expected at least 1 clip, got {config.draws}")
    require_filled_in(config)
    model = config.model.build()
    sampler = config.masks.build(model.grid, tubelet_size=model.tubelet_size)
    masks = sampler(config.draws, mask_generator(config.run.seed, 0, 0))
    name, clip = first_clip(config.data, model)
    names = kind_names(config.masks)
    picture = mask_figure(clip, masks, model.grid, kinds=names, columns=config.columns, title=f"Masks over {name}")
    print("\n".join(statistics_lines(mask_statistics(masks, model.grid), names)))
    print(f"wrote {save_png(config.out, picture)}")
    return OK


def first_clip(data: DataConfig, model: VJEPAConfig) -> tuple[str, Tensor]:
    """Name and pixels uint8 [C,T,H,W] of the first readable video of the first source; DataError where none is."""
    videos = find_videos(data.all_sources()[0].path)
    for video in videos:
        try:
            clip = read_clip(
                video.path,
                model.num_frames,
                image_size=model.image_hw,
                frame_stride=data.frame_stride,
                fps=data.fps,
                channels=model.in_channels,
                timeout=data.clip_timeout,
                tensor_fps=data.tensor_fps,
            )
        except ClipError as error:
            print(f"skipped {error}", file=sys.stderr)
        else:
            return Path(video.path).name, clip
    raise DataError(f"none of the {len(videos)} videos of {data.all_sources()[0].path} can be read")


def kind_names(masks: MaskConfig) -> list[str]:
    """What each mask kind is called in pictures and tables."""
    if masks.strategy == "tube":
        return [f"random tube, {masks.tube_ratio:g} hidden"]
    first = f", context in the first {masks.causal_frames} frames" if masks.strategy == "causal" else ""
    return [f"{blocks} block{'s' if blocks > 1 else ''} of scale {scale:g}{first}" for blocks, scale in masks.kinds]


def statistics_lines(statistics: dict[str, Any], names: Sequence[str]) -> list[str]:
    """`vjepa.masks.mask_statistics` as a table of text."""
    width = max(map(len, names))
    lines = [f"{'mask':<{width}}  {'context tokens':>24}  {'target tokens':>24}  hidden  dropped"]
    for name, kind in zip(names, statistics["kinds"], strict=True):
        cells = [
            f"{c['mean']:.0f} +- {c['std']:.0f} ({c['min']}..{c['max']})" for c in (kind["context"], kind["target"])
        ]
        lines.append(
            f"{name:<{width}}  {cells[0]:>24}  {cells[1]:>24}  {kind['hidden']:>6.1%}  {kind['dropped']:>7.1%}"
        )
    return [*lines, f"tokens of a clip kept and hidden, over {statistics['clips']} clips"]
