"""Clips from pre-decoded files: .npy and .pt tensors, uint8 [T,H,W,C]; only the frames that are needed are read."""

from __future__ import annotations

import os
import pickle

import numpy as np
import torch
from torch.nn.functional import interpolate

from vjepa.data.errors import ClipError
from vjepa.data.transform import Crop

TENSOR_ENDINGS = (".npy", ".pt")


def is_tensor_file(path: str) -> bool:
    """Whether the file's name ends like a tensor file's."""
    return os.path.splitext(path)[1].lower() in TENSOR_ENDINGS


def open_tensor(path: str, channels: int | None = None) -> np.ndarray:
    """The frames of a tensor file, uint8 [T,H,W,C], mapped rather than read.

    Args:
        path: a .npy file, or a .pt file holding one tensor.
        channels: the C that is wanted; None takes any.

    Raises:
        ClipError: it cannot be read, or has another dtype, shape or number of channels.
    """
    try:
        if path.lower().endswith(".npy"):
            frames = np.load(path, mmap_mode="r")
        else:
            loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            if not isinstance(loaded, torch.Tensor):
                raise ClipError(path, f"expected one tensor, got {type(loaded).__name__}", whole_file=True)
            frames = loaded.numpy()
    except (OSError, ValueError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ClipError(path, f"cannot be read: {str(error).splitlines()[0]}", whole_file=True) from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or 0 in frames.shape:
        got = f"{frames.dtype} {list(frames.shape)}"
        raise ClipError(path, f"expected frames as uint8 [T,H,W,C], got {got}", whole_file=True)
    if channels is not None and frames.shape[3] != channels:
        raise ClipError(path, f"expected {channels} channels, got {frames.shape[3]}", whole_file=True)
    return frames


def resize_frames(frames: np.ndarray, crop: Crop, image_size: tuple[int, int], flip: bool) -> np.ndarray:
    """Crop and resize (bilinear, antialiased): uint8 [T,H,W,C] -> uint8 [C,T,h,w]."""
    height, width = frames.shape[1:3]
    w, h = max(1, round(crop.width * width)), max(1, round(crop.height * height))
    x, y = min(round(crop.x * width), width - w), min(round(crop.y * height), height - h)
    pixels = torch.from_numpy(np.ascontiguousarray(frames[:, y : y + h, x : x + w].transpose(0, 3, 1, 2)))
    if (h, w) != image_size:
        pixels = interpolate(pixels, image_size, mode="bilinear", antialias=True, align_corners=False)
    if flip:
        pixels = pixels.flip(-1)
    return np.ascontiguousarray(pixels.numpy().transpose(1, 0, 2, 3))
