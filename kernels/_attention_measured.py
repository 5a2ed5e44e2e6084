"""Backends of varlen_attention as bench_attention found them; written by benchmarks/choose_attention.py.

Fastest first, forward and backward together. Entries: dtype, head_dim, mean tokens of a sequence, whether all have one
length, order.
"""

MEASURED: dict[str, list[tuple[str, int, int, bool, tuple[str, ...]]]] = {
}
