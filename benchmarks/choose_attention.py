"""From the results of bench_attention to the table by which `auto` chooses the backend of varlen_attention.

    python benchmarks/choose_attention.py [FOLDER]     reads FOLDER/attention-*.json (benchmarks/results) and writes
                                                       kernels/_attention_measured.py

A backend is judged by its time for forward and backward together. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "kernels" / "_attention_measured.py"
HEADER = '''"""Backends of varlen_attention as bench_attention found them; written by benchmarks/choose_attention.py.

Fastest first, forward and backward together. Entries: dtype, head_dim, mean tokens of a sequence, whether all have one
length, order.
"""

MEASURED: dict[str, list[tuple[str, int, int, bool, tuple[str, ...]]]] = {'''

Entry = tuple[str, int, int, bool, tuple[str, ...]]


def kind_of(about: dict[str, Any]) -> str:
    """cpu, cpu_amx for one with AMX, or sm_90 for compute capability 9.0."""
    capability = about.get("capability")
    if about["kind"] == "cpu":
        return f"cpu_{capability}" if capability else "cpu"
    return "sm_" + capability.replace(".", "")


def entries(works: list[dict[str, Any]]) -> list[Entry]:
    """The order for each work of forward and backward together."""
    found: list[Entry] = []
    for work in works:
        named = [row for row in work["results"] if row["backend"] not in (None, "auto")]
        if "backward" not in work["name"] or not named:
            continue
        lengths, head_dim = work["shapes"]["lengths"], work["shapes"]["qkv"][3]
        order = tuple(row["backend"] for row in sorted(named, key=lambda row: row["median"]))
        found.append((work["dtype"], head_dim, round(statistics.fmean(lengths)), len(set(lengths)) == 1, order))
    return sorted(found)


def table(folder: Path) -> str:
    """The text of the table for all results of a folder; of two files of one kind of device, the later name counts."""
    kinds: dict[str, list[Entry]] = {}
    for path in sorted(folder.glob("attention-*.json")):
        content = json.loads(path.read_text())
        kinds[kind_of(content["machine"])] = entries(content["works"])
    lines = [HEADER]
    for kind, found in sorted(kinds.items()):
        lines.append(f'    "{kind}": [')
        for dtype, head_dim, tokens, alike, order in found:
            names = ", ".join(f'"{name}"' for name in order) + "," * (len(order) == 1)
            lines.append(f'        ("{dtype}", {head_dim}, {tokens}, {alike}, ({names})),')
        lines.append("    ],")
    return "\n".join([*lines, "}"]) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Writes the table by which auto chooses the backend of attention.")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    TABLE.write_text(table(parser.parse_args().folder))


if __name__ == "__main__":
    main()
