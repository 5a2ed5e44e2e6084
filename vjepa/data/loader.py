"""Batches of clips, read in worker processes.

Everything in the batch of step k is a pure function of (seed, rank, world_size, k) and the files: not of the number of
workers, nor of the steps before. Resuming a run is asking for its batches from a later step on. (Only a file that hits
the time limit can make a difference.)

Decoders are opened inside workers, one thread each, and closed after every clip.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset

from vjepa.data.batch import Batch, ClipRef
from vjepa.data.clip import Clip, ClipSpec, RandomPlacement, load_clip
from vjepa.data.config import DataConfig
from vjepa.data.errors import BadFile, ClipError, ClipTimeout, DataError
from vjepa.data.sampling import PLACE, VideoSampler, stream
from vjepa.data.sources import VideoTable, find_videos
from vjepa.data.torchcodec_frames import check_decoder
from vjepa.data.workers import Workers, read_in_workers
from vjepa.masks import Masks, mask_generator

log = logging.getLogger("vjepa.data")

MaskSampler = Callable[[int, torch.Generator], Masks]

SPARES = 100  # stand-ins tried for one bad file before giving up: more can only mean that nothing can be read
TIMEOUTS = 5  # files over the time limit in one place: the storage is at fault, not the files
KNOWN_BAD = 10_000  # bad files a worker remembers, so that a later pass need not open them again
EXAMPLES = 5  # bad files named in an error


class BatchMaker(Dataset[Batch | DataError]):
    """Makes the batch of a step; this is what a worker process holds.

    Args: see ClipLoader.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: ClipSpec,
        batch_size: int,
        mask_sampler: MaskSampler | None,
        seed: int,
        rank: int,
        world_size: int,
    ):
        sources = config.all_sources()
        self.config, self.spec, self.batch_size, self.mask_sampler = config, spec, batch_size, mask_sampler
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.tables = [VideoTable(find_videos(source.path, source.folder_labels)) for source in sources]
        self.names = [source.path for source in sources]
        self.sampler = VideoSampler([len(t) for t in self.tables], [source.weight for source in sources], seed)
        self._known_bad: dict[str, str] = {}

    def __getitem__(self, step: int) -> Batch | DataError:
        """The batch of a step; a DataError is returned, not raised, to reach the user without a worker's traceback."""
        try:
            return self.make(step)
        except DataError as error:
            return error

    def make(self, step: int) -> Batch:
        """The batch of a step; DataError when one of its clips finds no readable video."""
        began = time.perf_counter()
        height, width = self.spec.image_size
        shape = (self.batch_size, self.spec.channels, self.spec.num_frames, height, width)
        video = torch.empty(shape, dtype=torch.uint8)
        pixels = video.numpy()
        labels: list[int] = []
        clips: list[ClipRef] = []
        bad: list[BadFile] = []
        for position in range(self.batch_size):
            number = (step * self.world_size + self.rank) * self.batch_size + position
            path, label, clip = self._read(number, bad)
            pixels[position] = clip.pixels
            labels.append(label)
            clips.append(ClipRef(path, clip.start, clip.interval, clip.crop, clip.flip))
        masks = None
        if self.mask_sampler is not None:
            masks = self.mask_sampler(self.batch_size, mask_generator(self.seed, self.rank, step))
        seconds = time.perf_counter() - began
        draws = self.batch_size + len(bad)
        return Batch(step, video, torch.tensor(labels, dtype=torch.int64), clips, masks, bad, draws, seconds)

    def _read(self, number: int, bad: list[BadFile]) -> tuple[str, int, Clip]:
        """Clip `number` of the run, from its own video or else from the first of its stand-ins that is good."""
        source, chosen = self.sampler.draw(number)
        tried: list[BadFile] = []
        timeouts = 0
        for attempt, index in enumerate([chosen, *self.sampler.spares(number, source)[:SPARES]]):
            if attempt and index == chosen:
                continue
            path, label = self.tables[source][int(index)]
            rng = stream(self.seed, PLACE, number, attempt)
            placement = RandomPlacement(rng, self.config.scale, self.config.aspect, self.config.hflip)
            try:
                clip = self._load(path, placement)
            except ClipError as error:
                tried.append(BadFile(path, error.reason))
                timeouts += isinstance(error, ClipTimeout)
                if timeouts == TIMEOUTS:
                    break
                continue
            bad.extend(tried)
            return path, label, clip
        total = len(self.tables[source])
        raise DataError(
            f"no readable video in {self.names[source]}: all of the {len(tried)} files tried, of {total}, are bad; "
            + _examples(tried),
            [*bad, *tried],
        )

    def _load(self, path: str, placement: RandomPlacement) -> Clip:
        if path in self._known_bad:
            raise ClipError(path, self._known_bad[path], whole_file=True)
        try:
            return load_clip(path, self.spec, placement)
        except ClipError as error:
            if error.whole_file and len(self._known_bad) < KNOWN_BAD:
                self._known_bad[path] = error.reason
            raise


class ClipLoader:
    """Batches of random clips from the sources of a configuration, with their masks.

    Args:
        config: where the videos are and how clips are taken from them.
        num_frames: T.
        image_size: (H, W) in pixels.
        batch_size: clips per batch on this rank.
        mask_sampler: called as sampler(batch_size, generator) for each batch, in the worker; None: no masks.
        seed, rank, world_size: batches are a pure function of these and of the step; ranks get different clips and masks.
        channels: 3 (RGB) or 1 (grey); tensor files must hold as many.

    Attributes:
        num_videos: videos found, over all sources.
        draws: files read so far.
        bad: path -> reason of each different bad file met so far.

    Raises:
        DataError: a source does not exist, holds no video, or is malformed; the decoder cannot be used here.
        ValueError: no source given, or an argument out of range.
    """

    def __init__(
        self,
        config: DataConfig,
        num_frames: int,
        image_size: tuple[int, int],
        batch_size: int,
        mask_sampler: MaskSampler | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        channels: int = 3,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        spec = ClipSpec(
            num_frames=num_frames,
            image_size=(image_size[0], image_size[1]),
            frame_stride=config.frame_stride,
            fps=config.fps,
            channels=channels,
            min_frames=config.min_frames,
            short=config.short,
            timeout=config.clip_timeout,
            tensor_fps=config.tensor_fps,
            decoder=config.decoder,
        )
        check_decoder(config.decoder)
        self.config = config
        self.maker = BatchMaker(config, spec, batch_size, mask_sampler, seed, rank, world_size)
        self.num_videos = sum(len(table) for table in self.maker.tables)
        self.draws, self.bad_draws = 0, 0
        self.bad: dict[str, str] = {}

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start, ..., stop - 1, in order; page-locked where there is a GPU.

        Raises:
            DataError: nothing readable, more bad files than `max_bad_share`, or a worker that died.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"steps must be 0 <= start <= stop, got start {start}, stop {stop}")
        workers = Workers(self.config.num_workers, self.config.prefetch, self.config.start_method)
        for item in read_in_workers(self.maker, range(start, stop), workers, self._patience()):
            if isinstance(item, DataError):
                for file in item.bad:
                    self.bad.setdefault(file.path, file.reason)
                raise item
            self._count(item)
            yield item

    def _patience(self) -> float:
        """Seconds after which a batch cannot come any more: every clip, and as many stand-ins, at their time limits."""
        return self.config.clip_timeout * TIMEOUTS * (self.maker.batch_size + 1)

    def _count(self, batch: Batch) -> None:
        self.draws += batch.draws
        self.bad_draws += len(batch.bad)
        for file in batch.bad:
            if file.path not in self.bad:
                self.bad[file.path] = file.reason
                log.warning("skipped %s: %s", file.path, file.reason)
        share = self.bad_draws / self.draws
        if self.draws >= self.config.judge_after and share > self.config.max_bad_share:
            raise DataError(
                f"{self.bad_draws} of {self.draws} files read were bad ({share:.0%}, more than max_bad_share = "
                f"{self.config.max_bad_share:.0%}), {len(self.bad)} different ones; "
                + _examples([BadFile(path, reason) for path, reason in self.bad.items()])
            )


def _examples(bad: list[BadFile]) -> str:
    more = f" (and {len(bad) - EXAMPLES} more)" if len(bad) > EXAMPLES else ""
    return "for example " + "; ".join(f"{file.path}: {file.reason}" for file in bad[:EXAMPLES]) + more
