"""A pretraining run from its configuration to its last checkpoint: data, steps, monitors, metrics, signals.

    <run>/config.json  metrics.jsonl  bad_files.jsonl  checkpoints/step_00001000/  tensorboard/
          nonfinite/step_00000017/

Everything that decides the numbers of step k is a function of the configuration and k (clips, masks, schedules) or is
in the checkpoint (weights, moments, random generators, number of threads): a resumed run on a CPU is the run it would
have been, bit for bit.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vjepa.checkpoint import CHECKPOINTS, list_checkpoints, prune_checkpoints, step_name
from vjepa.data import Batch, ClipLoader, DataError
from vjepa.model import VJEPA
from vjepa.monitors import CollapseAlarm
from vjepa.train.config import PretrainConfig
from vjepa.train.distributed import World, any_rank, barrier, distributed_world, gather_objects
from vjepa.train.guard import NonFiniteError, save_bundle
from vjepa.train.numbers import StepNumbers
from vjepa.train.plain import to_plain
from vjepa.train.progress import ProgressLine
from vjepa.train.randomness import seed_everything
from vjepa.train.records import BadFiles, JsonLines, RunError, TensorBoard
from vjepa.train.run_directory import BAD_FILES_FILE, METRICS_FILE, forget_empty_run, open_run_directory
from vjepa.train.signals import StopSignals
from vjepa.train.threads import compute_threads, threads_beside
from vjepa.train.trainer import Trainer

log = logging.getLogger("vjepa")

COLLAPSE_EXIT_CODE = 3
RECENT = 2  # batches kept: a GPU tells of a step that was not finite when the next one is under way


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        dir: The run directory.
        steps_done: Optimizer steps applied.
        metrics: The last line of metrics, empty when no step was left to do.
        signal: Number of the signal that stopped it, 0 for none.
        collapsed: The collapse alarm stopped it.
    """

    dir: Path
    steps_done: int
    metrics: dict[str, Any]
    signal: int = 0
    collapsed: bool = False

    @property
    def exit_code(self) -> int:
        """0 for a finished run, 130 after Ctrl-C, 143 after SIGTERM, 3 when the collapse alarm stopped it."""
        if self.signal:
            return 128 + self.signal
        return COLLAPSE_EXIT_CODE if self.collapsed else 0


def pretrain(config: PretrainConfig) -> RunResult:
    """Runs or resumes a pretraining run; under torchrun, as one process of it.

    Ctrl-C or SIGTERM ends it after the step it is in, with a checkpoint; a second one ends it at once.

    Raises:
        RunError: The run directory holds a run and run.resume is false, or another run than the one to resume, or
            cannot be written.
        DataError: No usable videos, or too many bad ones; the steps done are saved first.
        CheckpointError: A checkpoint cannot be read or written; the ones before stay.
        NonFiniteError: Loss or gradients are not finite; names step and clips, and leaves in the run directory what
            reproduces them.
        ValueError: Settings that do not fit together, naming them.
    """
    with distributed_world() as world:
        return _pretrain(config, world)


def _pretrain(config: PretrainConfig, world: World) -> RunResult:
    with _deterministic(config.run.deterministic), StopSignals() as stop, ExitStack() as stack:
        return _Run(config, world, stop, stack).train()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Run:
    """The parts of one run and the order in which they act."""

    def __init__(self, config: PretrainConfig, world: World, stop: StopSignals, stack: ExitStack) -> None:
        self.config, self.world, self.stop = config, world, stop
        model_config = config.model.build()
        self.loader = ClipLoader(
            config.data,
            num_frames=model_config.num_frames,
            image_size=model_config.image_hw,
            batch_size=config.train.batch_size,
            mask_sampler=config.masks.build(model_config.grid, model_config.tubelet_size),
            seed=config.run.seed,
            rank=world.rank,
            world_size=world.size,
            channels=model_config.in_channels,
        )
        self.directory = Path(config.run.dir)
        if world.rank == 0:
            open_run_directory(config)
            stack.callback(forget_empty_run, self.directory)
        barrier()
        seed_everything(config.run.seed)
        self.trainer = Trainer(VJEPA(model_config), config.train)
        self.alarm = CollapseAlarm()
        self.saved, self.skipped = -1, 0
        self.recent: deque[tuple[int, Batch]] = deque(maxlen=RECENT)
        on_cpu = self.trainer.device.type == "cpu"
        self.threads = threads_beside(config.data.num_workers) if on_cpu else torch.get_num_threads()
        self._resume()
        stack.enter_context(compute_threads(self.threads))
        self._open_outputs(stack)
        self._begin_window()

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.directory)
        if checkpoints:
            extra = self.trainer.load(checkpoints[-1])
            if not {"alarm", "skipped_clips", "threads"} <= extra.keys():
                raise RunError(f"Cannot resume {self.directory}: {checkpoints[-1]} was not saved by a run.")
            self.alarm.load_state_dict(extra["alarm"])
            processes = len(extra["skipped_clips"])
            if processes != self.world.size:
                raise RunError(
                    f"Cannot resume {self.directory} with {self.world.size} processes: it was run with {processes}, "
                    "which decides the clips of each step."
                )
            self.skipped = extra["skipped_clips"][self.world.rank]
            self._take_threads(extra["threads"][self.world.rank])
            self.saved = self.trainer.steps_done
        done, last = self.trainer.steps_done, self.config.train.last_step
        if done > last:
            raise RunError(f"Cannot resume {self.directory} up to step {last}: it is at step {done} already.")

    def _take_threads(self, saved: int) -> None:
        """As many threads as the run had, which decides the order of sums on a CPU, where PyTorch has as many here."""
        if self.trainer.device.type != "cpu" or saved == self.threads:
            return
        if saved <= torch.get_num_threads():
            self.threads = saved
        else:
            log.warning(
                "the run computed with %d threads and continues with %d: equal to rounding, not bit for bit",
                saved,
                self.threads,
            )

    def _open_outputs(self, stack: ExitStack) -> None:
        done, first = self.trainer.steps_done, self.world.rank == 0
        bad_name = BAD_FILES_FILE if first else f"bad_files.rank{self.world.rank}.jsonl"
        self.bad_files = BadFiles(self.directory / bad_name, done, self.skipped)
        stack.callback(self.bad_files.close)
        self.progress = ProgressLine(self.config.train.last_step, done, quiet=not first)
        stack.callback(self.progress.close)
        self.metrics: JsonLines | None = None
        self.board: TensorBoard | None = None
        if first:
            self.metrics = JsonLines(self.directory / METRICS_FILE, done)
            stack.callback(self.metrics.close)
            if self.config.run.tensorboard:
                self.board = TensorBoard(self.directory / "tensorboard", done)
                stack.callback(self.board.close)
        if self.config.run.resume:
            self.progress.message(
                f"{self.directory}: "
                + ("nothing saved yet, starting at step 1" if not done else f"resuming after step {done}")
                + (", which is the last one: nothing to do" if done == self.config.train.last_step else "")
            )

    def train(self) -> RunResult:
        """All steps that are left."""
        config, trainer = self.config, self.trainer
        line: dict[str, Any] = {}
        collapsed = False
        batches = self._batches()
        try:
            for batch in batches:
                number = trainer.steps_done + 1
                to_log = number == 1 or number % config.run.log_every == 0 or number == config.train.last_step
                numbers = self._step(batch, monitors=to_log)
                self.progress.advance(number)
                if to_log:
                    line = self._log(numbers)
                    collapsed = self._watch(line) and config.run.stop_on_collapse
                if number % config.run.checkpoint_every == 0:
                    self._save()
                if collapsed:
                    break
            trainer.settle()
        except NonFiniteError as error:
            raise self._bundle(error) from error
        finally:
            batches.close()
        signal = any_rank(self.stop.received) if trainer.steps_done < config.train.last_step else 0
        self._save()
        if signal:
            self.progress.message(
                f"stopped by signal {signal}; saved after step {trainer.steps_done}, continue with --resume"
            )
        return RunResult(self.directory, trainer.steps_done, line, signal, collapsed)

    def _batches(self) -> Generator[Batch]:
        """Batches of the steps left, timing the wait for each; what was trained is saved if the data gives out."""
        batches = iter(self.loader.batches(self.trainer.steps_done, self.config.train.last_step))
        while True:
            began = time.perf_counter()
            batch = self._next(batches)
            self.window_wait += time.perf_counter() - began
            if any_rank(self.stop.received) or batch is None:
                return
            yield batch

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        if self.stop.received:
            return None
        try:
            return next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if self.stop.received:  # a signal to the whole process group ends the workers too, whatever they were at
                return None
            if isinstance(error, DataError):
                self._keep_what_was_done()
            raise

    def _keep_what_was_done(self) -> None:
        for path, reason in self.loader.bad.items():  # also those of the batch that never came
            self.bad_files.note(self.trainer.steps_done + 1, path, reason, clips=0)
        if self.trainer.steps_done and self.world.size == 1:  # saving takes all processes; the others are in their step
            self._save()

    def _step(self, batch: Batch, monitors: bool) -> StepNumbers:
        assert batch.masks is not None  # the loader was given a sampler
        for bad in batch.bad:
            self.bad_files.note(self.trainer.steps_done + 1, bad.path, bad.reason)
        self.recent.append((self.trainer.steps_done, batch))
        began = time.perf_counter()
        numbers = self.trainer.step(batch.video, batch.masks, monitors=monitors)
        self.window_compute += time.perf_counter() - began
        self.window_clips += batch.video.shape[0] * self.world.size
        return numbers

    def _bundle(self, error: NonFiniteError) -> NonFiniteError:
        batch = next(batch for step, batch in self.recent if step == error.step)
        assert batch.masks is not None
        clips = [str(clip.path) for clip in batch.clips]
        name = step_name(error.step) + (f"_rank{self.world.rank}" if self.world.rank else "")
        bundle = save_bundle(
            self.directory / "nonfinite" / name, self.trainer, batch.video, batch.masks, error, to_plain(batch.clips)
        )
        return NonFiniteError(error.step, error.values, error.parameters, clips, bundle)

    def _begin_window(self) -> None:
        self.window_began = time.perf_counter()
        self.window_wait = self.window_compute = 0.0
        self.window_clips = 0

    def _log(self, numbers: StepNumbers) -> dict[str, Any]:
        """Writes a line of metrics; times are sums over the steps since the line before."""
        began = time.perf_counter()
        numbers.settle()
        self.window_compute += time.perf_counter() - began  # on a GPU the step ends here
        seconds = time.perf_counter() - self.window_began
        line = {
            "step": self.trainer.steps_done,
            **numbers,
            "clips_per_s": self.window_clips / seconds,
            "data_wait_s": self.window_wait,
            "compute_s": self.window_compute,
            "bad_files": self.bad_files.files,
            "skipped_clips": self.bad_files.clips,
        }
        self._begin_window()
        self.progress.update(self.trainer.steps_done, line)
        if self.metrics:
            self.metrics.write(line)
        if self.board:
            self.board.write(self.trainer.steps_done, {name: value for name, value in line.items() if name != "step"})
        return line

    def _watch(self, line: dict[str, Any]) -> bool:
        """Shows the numbers to the alarm; true while it is on."""
        for event in self.alarm.observe(line):
            log.warning("step %d: %s", self.trainer.steps_done, event.message)
            if self.metrics:
                self.metrics.write({"step": self.trainer.steps_done, "event": event.kind, **to_plain(event)})
        return bool(any_rank(self.alarm.active))

    def _save(self) -> None:
        if self.saved == self.trainer.steps_done:
            return
        if self.metrics:
            self.metrics.flush_to_disk()
        extra = {
            "alarm": self.alarm.state_dict(),
            "skipped_clips": gather_objects(self.bad_files.clips),
            "threads": gather_objects(self.threads),
        }
        self.trainer.save(self.directory / CHECKPOINTS / step_name(self.trainer.steps_done), extra)
        self.saved = self.trainer.steps_done
        if self.world.rank == 0:
            prune_checkpoints(self.directory, self.config.run.keep)
