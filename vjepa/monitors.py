"""Watching for collapse, which the loss does not show: a constant encoder predicts itself perfectly.

Three numbers of one batch, each over a sample of tokens X [n, D]:

    target_std          of the layer-normalised targets: standard deviation over tokens, mean over features; at most 1
    effective_rank      of the same: exp(-sum_i p_i log p_i), p the eigenvalues of their covariance, normalised to sum 1
                        (Roy and Vetterli 2007)
    predictor_variance  of the predictions: variance over tokens, mean over features

A healthy run dips: the standard deviation falls by about a third in the first hundreds of steps and rises again. A
collapse does not stop there. So the alarm compares with the best value of the run so far, far below what a dip reaches,
and needs several observations in a row, both to go off and to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm

SAMPLE_TOKENS = 512
# Seen in small runs: a healthy one went down to 0.7 of its best deviation and 0.3 of its best rank, collapsed ones to
# 0.15 of either, and not always of both.
ALARM_SHARE = {"target_std": 0.35, "effective_rank": 0.18}
TARGET_NORM_EPS = 1e-5


def sample_rows(rows: torch.Tensor, count: int = SAMPLE_TOKENS) -> torch.Tensor:
    """At most `count` rows of [N, D], chosen the same way for the same N, without touching any random generator."""
    if rows.shape[0] <= count:
        return rows
    chosen = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))[:count]
    return rows[chosen.to(rows.device)]


def effective_rank(rows: torch.Tensor) -> torch.Tensor:
    """Entropy rank of the covariance of rows [n, D]: a float32 scalar from 1 (also for constant rows) to min(n - 1, D).

    The eigenvalues are those of the smaller of covariance [D, D] and Gram matrix [n, n]: their non-zero ones agree.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    gram = centred.T @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp().float()


@torch.no_grad()
def collapse_metrics(target_features: torch.Tensor, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three numbers above as float32 scalars on the tensors' device.

    Args:
        target_features: Raw output of the target encoder, [B, L, D].
        prediction: Predictions, [Nt, D].
    """
    features = sample_rows(target_features.flatten(0, -2)).float()
    targets = layer_norm(features, features.shape[-1:], eps=TARGET_NORM_EPS)
    return {
        "target_std": targets.std(dim=0, correction=0).mean(),
        "effective_rank": effective_rank(targets),
        "predictor_variance": sample_rows(prediction).float().var(dim=0, correction=0).mean(),
    }


@dataclass(frozen=True)
class Event:
    """An alarm that went off or ended.

    Args:
        kind: "collapse" or "recovered".
        metric: The number that decided.
        value: What it is.
        limit: What it crossed.
        message: One sentence for the log.
    """

    kind: str
    metric: str
    value: float
    limit: float
    message: str


class CollapseAlarm:
    """Goes off when a monitored number stays far below the best it has been in this run.

    Args:
        alarm_share: Per metric, the share of its best value below which it counts as collapsed.
        clear_share: Factor on that limit which it must exceed again for the alarm to end.
        patience: Observations in a row that it takes, both ways.
    """

    def __init__(
        self, alarm_share: dict[str, float] | None = None, clear_share: float = 1.4, patience: int = 3
    ) -> None:
        self.alarm_share = alarm_share or dict(ALARM_SHARE)
        self.clear_share = clear_share
        self.patience = patience
        self._best = dict.fromkeys(self.alarm_share, 0.0)
        self._streak = dict.fromkeys(self.alarm_share, 0)
        self._collapsed = dict.fromkeys(self.alarm_share, False)

    @property
    def active(self) -> bool:
        """True while any metric counts as collapsed."""
        return any(self._collapsed.values())

    def observe(self, metrics: dict[str, float]) -> list[Event]:
        """Takes the numbers of one observation; returns the alarms that went off or ended with it."""
        events = []
        for name, share in self.alarm_share.items():
            value = metrics[name]
            self._best[name] = max(self._best[name], value)
            limit = share * self._best[name]
            collapsed = self._collapsed[name]
            crossed = value > self.clear_share * limit if collapsed else value < limit
            self._streak[name] = self._streak[name] + 1 if crossed else 0
            if self._streak[name] >= self.patience:
                self._streak[name] = 0
                self._collapsed[name] = not collapsed
                events.append(self._event(name, value, limit, collapsed))
        return events

    def _event(self, name: str, value: float, limit: float, recovered: bool) -> Event:
        if recovered:
            limit *= self.clear_share
            return Event("recovered", name, value, limit, f"Recovered: {name} is {value:.3g} again, above {limit:.3g}.")
        message = (
            f"Collapse: {name} fell to {value:.3g}, below {limit:.3g}, having been {self._best[name]:.3g}; the "
            "features lose what distinguishes clips. A lower learning rate or a higher momentum usually prevents it."
        )
        return Event("collapse", name, value, limit, message)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike, as JSON values."""
        return {"best": dict(self._best), "streak": dict(self._streak), "collapsed": dict(self._collapsed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._best, self._streak, self._collapsed = dict(state["best"]), dict(state["streak"]), dict(state["collapsed"])
