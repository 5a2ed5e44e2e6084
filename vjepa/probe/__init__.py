"""Attentive probes: what frozen features hold, read out by one learned query."""

from vjepa.probe.fit import ProbeResult, accuracy, fit_probe
from vjepa.probe.pooler import AttentiveClassifier, AttentivePooler

__all__ = ["AttentiveClassifier", "AttentivePooler", "ProbeResult", "accuracy", "fit_probe"]
