"""Backends of varlen_attention as bench_attention found them; written by benchmarks/choose_attention.py.

Fastest first, forward and backward together. Entries: dtype, head_dim, mean tokens of a sequence, whether all have one
length, order.
"""

MEASURED: dict[str, list[tuple[str, int, int, bool, tuple[str, ...]]]] = {
    "cpu": [
        ("bfloat16", 24, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 32, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 64, 112, True, ("cpu", "reference", "sdpa")),
        ("bfloat16", 64, 375, False, ("cpu", "sdpa", "reference")),
        ("bfloat16", 64, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 80, 375, False, ("cpu", "sdpa", "reference")),
        ("bfloat16", 80, 1568, True, ("cpu", "sdpa", "reference")),
        ("float32", 24, 1568, True, ("sdpa", "reference")),
        ("float32", 32, 1568, True, ("cpu", "sdpa", "reference")),
        ("float32", 64, 112, True, ("cpu", "sdpa", "reference")),
        ("float32", 64, 375, False, ("cpu", "sdpa", "reference")),
        ("float32", 80, 375, False, ("cpu", "sdpa", "reference")),
    ],
    "cpu_amx": [
        ("bfloat16", 24, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 32, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 64, 112, True, ("cpu", "reference", "sdpa")),
        ("bfloat16", 64, 375, False, ("cpu", "sdpa", "reference")),
        ("bfloat16", 64, 1568, True, ("cpu", "sdpa", "reference")),
        ("bfloat16", 80, 375, False, ("cpu", "sdpa", "reference")),
        ("bfloat16", 80, 1568, True, ("cpu", "sdpa", "reference")),
        ("float32", 24, 1568, True, ("cpu", "sdpa", "reference")),
        ("float32", 32, 1568, True, ("cpu", "sdpa", "reference")),
        ("float32", 64, 112, True, ("cpu", "sdpa", "reference")),
        ("float32", 64, 375, False, ("cpu", "sdpa", "reference")),
        ("float32", 80, 375, False, ("cpu", "sdpa", "reference")),
    ],
}
