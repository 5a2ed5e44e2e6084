"""Training: configuration, the trainer of one step, and the loop of a run.

Names resolve on first use (PEP 562), so that a `Trainer` in somebody's own loop needs no video decoder.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa.train.config import PretrainConfig, RunConfig
    from vjepa.train.guard import NonFiniteError
    from vjepa.train.loop import RunResult, pretrain
    from vjepa.train.recipe import TrainConfig
    from vjepa.train.records import RunError
    from vjepa.train.trainer import Trainer

_EXPORTS = {
    "NonFiniteError": "guard",
    "PretrainConfig": "config",
    "RunConfig": "config",
    "RunError": "records",
    "RunResult": "loop",
    "TrainConfig": "recipe",
    "Trainer": "trainer",
    "pretrain": "loop",
}
__all__ = [
    "NonFiniteError",
    "PretrainConfig",
    "RunConfig",
    "RunError",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vjepa.train' has no attribute {name!r}")
    value = getattr(import_module(f"vjepa.train.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
