"""Training an attentive probe on features computed once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa.probe.pooler import AttentiveClassifier, check_count


@dataclass(frozen=True)
class ProbeResult:
    """A trained probe.

    Attributes:
        probe: the classifier, in eval mode.
        train_accuracy: share of the training clips it gets right (0..1): near 1 says that it has converged.
        losses: mean cross-entropy of each epoch, in nats.
    """

    probe: AttentiveClassifier
    train_accuracy: float
    losses: tuple[float, ...]


def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    num_heads: int,
    depth: int = 1,
    mlp_ratio: float = 4.0,
    epochs: int = 40,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> ProbeResult:
    """Train an AttentiveClassifier on frozen features: AdamW, linear warm-up over a tenth of the steps, then cosine to 0.

    Args:
        features: [N, L, D] floating and finite, any device; the probe is trained there in float32.
        labels: int64 [N], 0 <= label < num_classes.
        num_classes, num_heads, depth, mlp_ratio: of the AttentiveClassifier.
        epochs: passes over all samples. batch_size: samples of a step.
        lr: peak learning rate, above 0. weight_decay: on matrices only, at least 0.
        seed: of initialisation and of the order of samples; nothing else is random, and the global generator is untouched.
        on_epoch: called with (epoch from 1, mean loss).

    Raises ValueError/TypeError where a shape, dtype or range is not as above.
    """
    check_count("num_classes", num_classes, 2)
    _check(features, labels, num_classes)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be a finite number above 0, got {lr!r}")
    if not isinstance(weight_decay, int | float) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the generators of all GPUs too
        probe = AttentiveClassifier(features.shape[2], num_heads, mlp_ratio, depth, num_classes)
    probe.to(features.device)
    trained = [p for p in probe.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    steps = epochs * -(-len(features) // batch_size)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    order = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=features.device)
        for rows in torch.randperm(len(features), generator=order).to(features.device).split(batch_size):
            loss = F.cross_entropy(probe(features[rows].float()), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        losses.append(total.item() / len(features))
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    probe.eval()
    return ProbeResult(probe, accuracy(probe, features, labels), tuple(losses))


@torch.no_grad()
def accuracy(probe: AttentiveClassifier, features: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share (0..1) of clips whose largest logit is their label.

    features [N, L, D] floating and finite, labels int64 [N], `batch_size` clips at a time. Errors as `fit_probe`.
    """
    check_count("batch_size", batch_size)
    _check(features, labels, probe.linear.out_features)
    hits = sum(
        (probe(x.float()).argmax(dim=-1) == y).sum()
        for x, y in zip(features.split(batch_size), labels.split(batch_size), strict=True)
    )
    return int(hits) / len(labels)


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    for name, value in (("features", features), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if features.ndim != 3 or not len(features) or not features.is_floating_point():
        raise ValueError(
            f"features must be floating [N, L, D], N at least 1, got {features.dtype} {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinite values")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1] or labels.device != features.device:
        raise ValueError(
            f"labels must be int64 [{len(features)}] on {features.device}, "
            f"got {labels.dtype} {list(labels.shape)} on {labels.device}"
        )
    low, high = labels.aminmax()
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be within 0..{num_classes - 1}, got {int(low)}..{int(high)}")
