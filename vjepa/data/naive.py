"""The loop that people write with PyAV, as a yardstick: every frame of the clip's stretch becomes a full-size RGB array,
then the sampled ones are taken, cropped and resized by PyTorch.

It seeks to the clip and stops at its end (decoding from the beginning of the file would be slower still), uses one thread
like a worker of ours, and crops before it resizes. It knows nothing of damaged files, time limits or odd timestamps.
"""

from __future__ import annotations

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vjepa.data.batch import ClipRef
from vjepa.data.transform import colour_step, crop_rectangle


def naive_clip(ref: ClipRef, num_frames: int, image_size: tuple[int, int]) -> Tensor:
    """The clip of a reference, uint8 [3,T,H,W].

    Args:
        ref: a clip of a video file.
        num_frames, image_size: T and (H, W).

    Raises:
        av.error.FFmpegError, ValueError: it cannot be read in this way.
    """
    with av.open(ref.path) as container:
        stream = max(container.streams.video, key=lambda s: s.width * s.height)
        stream.codec_context.thread_count = 1
        step = colour_step(stream.format)
        tick, first = float(stream.time_base), stream.start_time or 0
        wanted = ref.start + ref.interval * np.arange(num_frames) + 0.5 / float(stream.average_rate)
        container.seek(first + int(ref.start / tick), stream=stream)
        times: list[float] = []
        frames: list[np.ndarray] = []
        turns = 0
        for frame in container.decode(stream):
            time = (frame.pts - first) * tick
            if time > wanted[-1]:
                break
            if time >= ref.start - 0.5 / float(stream.average_rate):
                times.append(time)
                frames.append(frame.to_ndarray(format="rgb24"))
                turns = round(frame.rotation / 90)
    chosen = np.maximum(np.searchsorted(times, wanted, side="right") - 1, 0)
    pixels = torch.from_numpy(np.rot90(np.stack([frames[index] for index in chosen]), turns, (1, 2)).copy())
    pixels = pixels.permute(0, 3, 1, 2)
    x, y, w, h = crop_rectangle(ref.crop, pixels.shape[3], pixels.shape[2], step if turns % 2 == 0 else step[::-1])
    pixels = interpolate(pixels[:, :, y : y + h, x : x + w], image_size, mode="bilinear", antialias=True)
    if ref.flip:
        pixels = pixels.flip(-1)
    return pixels.transpose(0, 1).contiguous()
