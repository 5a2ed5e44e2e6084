"""Items of a data set, computed in worker processes, in order; a worker that dies or gets stuck is an error, not a hang.

Workers are copied from a server process that has no threads (`forkserver`): forking the training process instead would
copy whatever locks torch's, the progress line's or TensorBoard's threads happen to hold, a well-known way for a loader to
hang. The server imports torch and PyAV once, so each worker starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vjepa.data.errors import DataError

Item = TypeVar("Item")

StartMethod = Literal["forkserver", "fork", "spawn"]

POLL = 2.0  # s between looks at whether the workers are alive
HINT = "was it killed (out of memory?), or does your script start it outside `if __name__ == '__main__':`?"
PRELOAD = ["vjepa.data.loader", "vjepa.data.evaluation"]


@dataclass(frozen=True)
class Workers:
    """How worker processes are run.

    Attributes:
        num_workers: how many; 0 computes in this process.
        prefetch: items each prepares ahead.
        start_method: as in DataConfig.
    """

    num_workers: int = 2
    prefetch: int = 2
    start_method: StartMethod = "forkserver"


def read_in_workers(dataset: Dataset[Item], keys: Sequence[int], workers: Workers, patience: float) -> Iterator[Item]:
    """dataset[key] for each key, in order, computed in worker processes (or here, with num_workers = 0).

    Args:
        dataset: picklable; items are passed on as they are.
        keys: what to ask it for.
        workers: how many, and how they are run.
        patience: seconds to wait for one item before giving up.

    Raises:
        DataError: a worker died, or an item did not come in time. Exceptions of the dataset are raised as they are.
    """
    options: dict[str, Any] = {}
    if workers.num_workers:
        context = multiprocessing.get_context(workers.start_method)
        if workers.start_method == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        options = {"multiprocessing_context": context, "prefetch_factor": workers.prefetch, "timeout": POLL}
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers.num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting the loader would draw from the training process's generator
        **options,
    )
    iterator = _start(loader)
    for _ in keys:
        yield _next(iterator, patience)


def _start(loader: DataLoader[Item]) -> Iterator[Item]:
    """iter(loader), without the SIGCHLD handler that it installs.

    That handler raises in the middle of whatever the main thread is doing, a training step for instance, when a worker
    has died; `_next` notices it too, while it waits for the worker.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    iterator = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _next(iterator: Iterator[Item], patience: float) -> Item:
    """The next item; DataError when its worker is dead or it has not come in time.

    torch looks whether workers live only when a wait has timed out, so the wait is short and repeated.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            return next(iterator)
        except (EOFError, ConnectionError) as error:  # its memory is handed over by the worker itself
            raise DataError(f"reading clips failed: a worker ended while handing over its batch; {HINT}") from error
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            if not message.startswith("DataLoader"):
                raise
            if "timed out" not in message:
                raise DataError(f"reading clips failed: {message}; {HINT}") from error
            if time.monotonic() > give_up:
                raise DataError(
                    f"no batch has come for {patience:g} s: workers are stuck, is the storage answering?"
                ) from error


def _unchanged(item: Item) -> Item:
    return item


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the training process decides what it means, workers carry on until then.

    They end with the training process, however that ends: torch watches the process that forked a worker, which is the
    server, and the server lives as long as its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)  # from a thread; there is nobody left to hand anything to
