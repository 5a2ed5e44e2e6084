"""Where in a video a clip lies: drawn at random for training, given for evaluation."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vjepa.data.transform import CROP_ATTEMPTS, Crop, largest_crop, random_crop

ROUNDING = 0.25  # frames; headers round durations to a millisecond or a tick


def whole_frames(seconds: float, rate: float) -> int:
    """How many whole frame periods fit in a time, give or take a header's rounding."""
    return int(seconds * rate + ROUNDING)


class Placement(Protocol):
    """Where in a video a clip lies, once the video's length and shape are known."""

    flip: bool

    def start(self, latest: float, rate: float) -> float:
        """Start in seconds, given the latest start that leaves room for the clip and the frame rate."""
        ...

    def crop(self, aspect: float) -> Crop:
        """Crop, given output width/height over displayed frame width/height."""
        ...


class RandomPlacement:
    """Uniform start on the frame grid, random resized crop, flip of half the clips; all from one generator.

    The numbers are drawn at once, in a fixed order, so that nothing depends on what the file turns out to hold.
    """

    def __init__(self, rng: np.random.Generator, scale: tuple[float, float], aspect: tuple[float, float], hflip: bool):
        draws = rng.random(2 + 4 * CROP_ATTEMPTS)
        self._start, self.flip = float(draws[0]), bool(hflip and draws[1] < 0.5)
        self._crop, self._scale, self._aspect = draws[2:].reshape(CROP_ATTEMPTS, 4), scale, aspect

    def start(self, latest: float, rate: float) -> float:
        """A whole number of frame periods, each from 0 to `latest` equally likely."""
        return int(self._start * (whole_frames(latest, rate) + 1)) / rate

    def crop(self, aspect: float) -> Crop:
        """Random resized crop, as in `random_crop`."""
        return random_crop(self._crop, aspect, self._scale, self._aspect)


class FixedPlacement:
    """A given start (None: the clip lies in the middle of the video) and a given crop or view."""

    def __init__(self, start: float | None = None, crop: Crop | float = 0.5, flip: bool = False):
        self._start, self._crop, self.flip = start, crop, flip

    def start(self, latest: float, rate: float) -> float:
        """The given start, or the middle rounded to the frame grid."""
        return whole_frames(latest / 2, rate) / rate if self._start is None else self._start

    def crop(self, aspect: float) -> Crop:
        """The given crop, or the largest one of the output's shape at the given view."""
        return self._crop if isinstance(self._crop, Crop) else largest_crop(aspect, self._crop)
