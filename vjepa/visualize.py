"""Pictures of what V-JEPA sees and learns: masks over frames, and PCA of token features over frames.

Arrays in, arrays out: clips are uint8 [C,T,H,W] (RGB, or one grey channel), pictures are uint8 [height,width,3] NumPy
arrays, and `save_png` writes them. A clip of T frames has a token grid (t,h,w): time step k of the grid covers the
frames k*T/t .. (k+1)*T/t - 1, and token (k,i,j) has the index (k*h + i)*w + j. Columns of every picture are time
steps; the frame shown is the first of its time step.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vjepa.masks import Masks

CONTEXT, TARGET, DROPPED = 0, 1, 2  # a token in one mask: seen, predicted, or neither (packings that drop tokens)
DARKEN = 0.22  # brightness left on hidden tokens: dark enough to read as hidden, light enough to see what was hidden
# Dropped tokens are reddish, so that no mask looks exact that is not.
DROPPED_TINT = np.array([150, 40, 40], dtype=np.float32)
GRID_LINE = 0.30  # share of white in the one-pixel token border
BACKGROUND, INK, FAINT = (255, 255, 255), (24, 28, 34), (96, 104, 114)
GAP, MARGIN, FONT_SIZE = 4, 12, 15  # pixels
MIN_TILE = 112  # smaller frames are enlarged by a whole factor to at least this height


@dataclass(frozen=True)
class Row:
    """One labelled row of equally sized tiles uint8 [H,W,3]."""

    label: str
    tiles: Sequence[np.ndarray]


def to_frames(clip: torch.Tensor | np.ndarray) -> np.ndarray:
    """uint8 clip [C,T,H,W] -> RGB frames uint8 [T,H,W,3].

    Three channels or more: the first three are shown; fewer: the first one, as grey. Raises ValueError on another
    shape or dtype.
    """
    array = clip.detach().cpu().numpy() if isinstance(clip, torch.Tensor) else np.asarray(clip)
    if array.ndim != 4 or array.dtype != np.uint8:
        raise ValueError(f"clip: expected uint8 [C,T,H,W], got {array.dtype} {list(array.shape)}")
    channels = array[:3] if array.shape[0] >= 3 else np.repeat(array[:1], 3, axis=0)
    return np.ascontiguousarray(channels.transpose(1, 2, 3, 0))


def token_states(masks: Masks, grid: tuple[int, int, int], clip: int = 0) -> list[np.ndarray]:
    """What each token of one clip is (CONTEXT, TARGET or DROPPED): a uint8 [t,h,w] array for each of its sets.

    Raises ValueError where the masks hold no set of that clip.
    """
    contexts = masks.context.indices.cpu().split(list(masks.context.lengths))
    targets = masks.target.indices.cpu().split(list(masks.target.lengths))
    states = []
    for number, owner in enumerate(masks.context.clip.tolist()):
        if owner == clip:
            state = np.full(int(np.prod(grid)), DROPPED, dtype=np.uint8)
            state[contexts[number].numpy()] = CONTEXT
            state[targets[number].numpy()] = TARGET
            states.append(state.reshape(grid))
    if not states:
        raise ValueError(
            f"masks: expected a set of clip {clip}, got sets of clips {sorted(set(masks.context.clip.tolist()))}"
        )
    return states


def mask_overlay(frame: np.ndarray, state: np.ndarray, *, grid_lines: bool = True) -> np.ndarray:
    """A frame uint8 [H,W,3] under token states uint8 [h,w]: context as it is, target dark, dropped reddish.

    H and W are whole multiples of h and w; raises ValueError otherwise.
    """
    (height, width), (rows, columns) = frame.shape[:2], state.shape
    if height % rows or width % columns:
        raise ValueError(
            f"frame: expected a size that is a multiple of the token grid {rows} x {columns}, got {height} x {width}"
        )
    token_h, token_w = height // rows, width // columns
    pixel_state = state.repeat(token_h, axis=0).repeat(token_w, axis=1)
    picture = frame.astype(np.float32)
    picture[pixel_state != CONTEXT] *= DARKEN
    picture[pixel_state == DROPPED] += DROPPED_TINT * (1 - DARKEN) / 2
    if grid_lines:
        for line in (np.s_[::token_h], np.s_[:, ::token_w]):
            picture[line] = picture[line] * (1 - GRID_LINE) + 255 * GRID_LINE
    return picture.clip(0, 255).astype(np.uint8)


def mask_figure(
    clip: torch.Tensor | np.ndarray,
    masks: Masks,
    grid: tuple[int, int, int],
    *,
    index: int = 0,
    kinds: Sequence[str] | None = None,
    columns: int = 6,
    title: str = "",
) -> np.ndarray:
    """Masks of clip `index` over its frames: a row of bare frames, then one for each mask kind with its counts.

    clip uint8 [C,T,H,W]; masks from any sampler on `grid` = (t,h,w); `kinds` names the rows; at most `columns` time
    steps are shown, evenly spread. Returns uint8 [height,width,3].
    """
    frames, steps = _shown_frames(to_frames(clip), grid, columns)
    rows = [Row("frames", frames)]
    total = int(np.prod(grid))
    for number, state in enumerate(token_states(masks, grid, index)):
        name = kinds[number] if kinds and number < len(kinds) else f"mask kind {number}"
        counts = [int((state == value).sum()) for value in (CONTEXT, TARGET, DROPPED)]
        label = f"{name}: context {_share(counts[0], total)}, target {_share(counts[1], total)}"
        label += f", dropped {_share(counts[2], total)}" if counts[2] else ""
        rows.append(Row(label, [mask_overlay(frame, state[step]) for frame, step in zip(frames, steps, strict=True)]))
    note = f"{total} tokens = {grid[0]} x {grid[1]} x {grid[2]} (time, height, width); clear: context, dark: target"
    note += "; reddish: dropped" if any("dropped" in row.label for row in rows) else ""
    return tile_figure(rows, title=title, note=note, column_labels=_step_labels(steps, frames_per_step(clip, grid)))


def pca_rgb(
    features: torch.Tensor | np.ndarray,
    grid: tuple[int, int, int],
    *,
    percentile: float = 1.0,
    remove_position: bool = False,
) -> np.ndarray:
    """The three main components of token features as colours: features [B,L,D] float -> uint8 [B,t,h,w,3].

    One PCA is fitted on all tokens of all B clips, so that a colour means the same everywhere. Each component is
    scaled from its `percentile` .. 100 - `percentile` (robust to a few outliers) to 0..255; its sign is fixed by its
    largest loading, so the same features always give the same picture. `remove_position` first takes away the mean
    over clips at each position, which leaves what differs between clips and not what the position table writes into
    every clip (needs B > 1). Components that do not exist (D < 3, or features that do not vary) are mid grey. Raises
    ValueError on wrong shapes.
    """
    x = (
        features.detach().cpu().double().numpy()
        if isinstance(features, torch.Tensor)
        else np.asarray(features, dtype=np.float64)
    )
    if x.ndim != 3 or x.shape[1] != int(np.prod(grid)):
        length = f"{'*'.join(map(str, grid))} = {int(np.prod(grid))}"
        raise ValueError(f"features: expected [B,L,D] with L = {length}, got {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError(f"features: expected finite numbers, got {int((~np.isfinite(x)).sum())} that are not")
    if remove_position:
        if x.shape[0] < 2:
            raise ValueError(f"features: remove_position needs at least 2 clips, got {x.shape[0]}")
        x = x - x.mean(axis=0, keepdims=True)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    vectors = vectors[:, ::-1][:, :3]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    projected = flat @ (vectors * signs)
    low, high = np.percentile(projected, [percentile, 100 - percentile], axis=0)
    spread = high - low
    flatline = spread <= 1e-9 * max(1.0, float(np.sqrt(max(values[-1], 0.0))))
    unit = np.where(flatline, 0.5, (projected - low) / np.where(flatline, 1.0, spread)).clip(0, 1)
    colours = np.full((len(flat), 3), 0.5)
    colours[:, : unit.shape[1]] = unit
    return np.round(colours * 255).astype(np.uint8).reshape(*x.shape[:1], *grid, 3)


def pca_figure(
    clips: torch.Tensor | np.ndarray,
    features: torch.Tensor | np.ndarray,
    grid: tuple[int, int, int],
    *,
    labels: Sequence[str] | None = None,
    columns: int = 8,
    percentile: float = 1.0,
    remove_position: bool = False,
    smooth: bool = False,
    title: str = "",
) -> np.ndarray:
    """PCA of token features over frames: for each clip a row of frames and, aligned below it, one of PCA colours.

    clips uint8 [B,C,T,H,W]; features [B,L,D] on `grid` = (t,h,w), for example `model.target_encoder(clips)`; `labels`
    names the clips; `smooth` blends between tokens instead of showing them as squares. See `pca_rgb`. Returns uint8
    [height,width,3].
    """
    colours = pca_rgb(features, grid, percentile=percentile, remove_position=remove_position)
    if len(clips) != len(colours):
        raise ValueError(f"features: expected one set of tokens per clip, got {len(colours)} for {len(clips)} clips")
    rows: list[Row] = []
    steps: list[int] = []
    for number, clip in enumerate(clips):
        frames, steps = _shown_frames(to_frames(clip), grid, columns)
        name = labels[number] if labels else f"clip {number}"
        tiles = [_resize(colours[number, step], frames[0].shape[:2], smooth) for step in steps]
        rows += [Row(name, frames), Row("", tiles)]
    note = "first three principal components of the tokens as red, green, blue; one PCA for all clips"
    note += "; each position's mean over clips removed" if remove_position else ""
    return tile_figure(rows, title=title, note=note, column_labels=_step_labels(steps, frames_per_step(clips[0], grid)))


def tile_figure(
    rows: Sequence[Row], *, title: str = "", note: str = "", column_labels: Sequence[str] = ()
) -> np.ndarray:
    """Rows of tiles on a white page, with title, note and column labels; a row without label sits close to the last."""
    font, bold = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 3)
    line = FONT_SIZE + 7
    tile_h, tile_w = rows[0].tiles[0].shape[:2]
    count = max(len(row.tiles) for row in rows)
    texts = [(title, bold), (note, font), *((row.label, font) for row in rows)]
    width = 2 * MARGIN + max(count * (tile_w + GAP) - GAP, *(int(font_.getlength(text)) + 1 for text, font_ in texts))
    height = 2 * MARGIN + sum((line if row.label else 0) + tile_h + GAP for row in rows)
    height += (line + 4 if title else 0) + (line if note else 0) + (line if column_labels else 0)
    page = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    if title:
        draw.text((MARGIN, y), title, INK, bold)
        y += line + 4
    if note:
        draw.text((MARGIN, y), note, FAINT, font)
        y += line
    for row in rows:
        if row.label:
            draw.text((MARGIN, y + 2), row.label, INK, font)
            y += line
        for column, tile in enumerate(row.tiles):
            page.paste(Image.fromarray(tile), (MARGIN + column * (tile_w + GAP), y))
        y += tile_h + GAP
    for column, label in enumerate(column_labels):
        x = MARGIN + column * (tile_w + GAP) + tile_w // 2
        draw.text((x, y), label, FAINT, font, anchor="ma")
    return np.asarray(page)


def png_bytes(picture: np.ndarray) -> bytes:
    """The picture uint8 [height,width,3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: str | Path, picture: np.ndarray) -> Path:
    """Writes a picture uint8 [height,width,3] to `path`, making its folder, and returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png_bytes(picture))
    return target


def frames_per_step(clip: torch.Tensor | np.ndarray, grid: tuple[int, int, int]) -> int:
    """Frames in one time step of the grid, for a clip [C,T,H,W]; ValueError where T, H or W is no multiple of it."""
    shape = tuple(clip.shape[-3:])
    if any(size % tokens for size, tokens in zip(shape, grid, strict=True)):
        raise ValueError(
            f"clip: expected frames, height and width that are multiples of the token grid {grid}, got {shape}"
        )
    return shape[0] // grid[0]


def _shown_frames(frames: np.ndarray, grid: tuple[int, int, int], columns: int) -> tuple[list[np.ndarray], list[int]]:
    """The first frames of at most `columns` evenly spread time steps, enlarged by a whole factor, and those steps."""
    stride = frames_per_step(frames.transpose(3, 0, 1, 2), grid)
    steps = np.unique(np.linspace(0, grid[0] - 1, min(max(columns, 1), grid[0])).round().astype(int)).tolist()
    factor = -(-MIN_TILE // frames.shape[1])
    size = (frames.shape[1] * factor, frames.shape[2] * factor)
    return [_resize(frames[step * stride], size, smooth=True) for step in steps], steps


def _resize(picture: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def _step_labels(steps: Sequence[int], stride: int) -> list[str]:
    return [f"frame {step * stride}" for step in steps]


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.0f} %)"
