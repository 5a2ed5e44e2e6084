"""Which video each clip of a run comes from, as a pure function of the seed and the clip's number.

Clip number g counts over steps, ranks and positions in the batch, so that a run can be resumed at any step, and batches
do not depend on how many workers read them. Sources take turns in proportion to their weights; within a source every
video comes once in each pass, in an order that is new for each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1000  # clips over which the sources' shares are exact: weights count to a thousandth
ORDER, TURN, PLACE, SPARE = range(4)  # what a random stream is for


def stream(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """A random generator that depends on nothing but its arguments."""
    return np.random.default_rng((seed & (2**64 - 1), purpose, *numbers))


class VideoSampler:
    """Draws (source, video) pairs.

    Args:
        sizes: number of videos of each source.
        weights: relative share of clips of each source.
        seed: any int.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.sizes, self.seed = tuple(sizes), seed
        self._quotas = _quotas(weights)
        self._turns = lru_cache(4)(self._turns_of)
        self._order = lru_cache(2 * len(self.sizes))(self._order_of)

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore, (self.sizes, self._quotas, self.seed))

    def draw(self, number: int) -> tuple[int, int]:
        """(source, video in it) of clip `number`."""
        block, position = divmod(number, BLOCK)
        sources, earlier = self._turns(block)
        source = int(sources[position])
        turn = block * self._quotas[source] + int(earlier[position])
        pass_number, place = divmod(turn, self.sizes[source])
        return source, int(self._order(source, pass_number)[place])

    def spares(self, number: int, source: int) -> np.ndarray:
        """Videos of the source, in the order in which they stand in for a bad one in clip `number`."""
        return stream(self.seed, SPARE, number).permutation(self.sizes[source])

    def _turns_of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a block: its source, and how many positions of that source come before it."""
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        if len(self._quotas) > 1:
            sources = stream(self.seed, TURN, block).permutation(sources)
        earlier = np.empty(BLOCK, np.int64)
        for source, quota in enumerate(self._quotas):
            earlier[sources == source] = np.arange(quota)
        return sources, earlier

    def _order_of(self, source: int, pass_number: int) -> np.ndarray:
        return stream(self.seed, ORDER, source, pass_number).permutation(self.sizes[source])


def _quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Clips of each source in a block: proportional, at least 1, BLOCK in all (largest remainders)."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    quotas = np.maximum(1, np.floor(share).astype(np.int64))
    while quotas.sum() != BLOCK:
        error = share - quotas
        if quotas.sum() < BLOCK:
            quotas[np.argmax(error)] += 1
        else:
            quotas[np.argmin(np.where(quotas > 1, error, np.inf))] -= 1
    return tuple(int(quota) for quota in quotas)


def _restore(sizes: tuple[int, ...], quotas: tuple[int, ...], seed: int) -> VideoSampler:
    sampler = VideoSampler(sizes, [1.0] * len(sizes), seed)
    sampler._quotas = quotas
    return sampler
