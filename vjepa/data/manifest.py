"""Manifests: lists of videos with optional labels, as CSV, Parquet, or one `path label` a line."""

from __future__ import annotations

import csv
import importlib.util
import os

from vjepa.data.errors import DataError

MANIFEST_ENDINGS = (".csv", ".tsv", ".parquet", ".txt", ".list")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "video", "video_path", "clip")
LABEL_COLUMNS = ("label", "cls", "class", "target", "category", "action", "class_name", "class_id")

Rows = list[tuple[str, str]]  # (path as written, label as written or "")


def read_manifest(path: str) -> Rows:
    """The rows of a manifest, as (path, label) strings, label "" where there is none; paths as they are written.

    Columns are found by name (path, file, video ...; label, cls, class ...), in any case; a CSV without a header has the
    path first and the label, if any, second. Text without commas is read as `path label` a line, the label being an
    integer after the last blank: the form the released V-JEPA uses. Empty lines and lines that begin with # are left out.

    Args:
        path: a file ending in .csv, .tsv, .txt, .list or .parquet (needs pyarrow).

    Raises:
        DataError: no path column, a row without a path, undecodable text, pyarrow missing.
    """
    if path.lower().endswith(".parquet"):
        return _read_parquet(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in file.read().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the manifest {path}: {error}") from error
    if not lines:
        return []
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    if delimiter not in lines[0]:
        return _after_header([_split(line) for line in lines])
    return _read_table(list(csv.reader(lines, delimiter=delimiter)), path)


def _split(line: str) -> tuple[str, str]:
    """`path label` -> (path, label); a path may hold blanks, so only an integer counts as a label."""
    head, _, tail = line.strip().rpartition(" ")
    if head and _is_int(tail):
        return head.strip(), tail
    return line.strip(), ""


def _after_header(rows: Rows) -> Rows:
    """Without a header line such as `path` or `path label`."""
    words = rows[0][0].lower().split()
    header = words[0] in PATH_COLUMNS and all(word in LABEL_COLUMNS for word in words[1:])
    return rows[1:] if header else rows


def _read_table(rows: list[list[str]], path: str) -> Rows:
    names = [name.strip().lower() for name in rows[0]]
    path_column = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    if path_column is None:
        path_column, label_column = 0, 1 if len(names) > 1 else None
    else:
        label_column = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
        rows = rows[1:]
    out: Rows = []
    for number, row in enumerate(rows, 1):
        entry = row[path_column].strip() if len(row) > path_column else ""
        if not entry:
            raise DataError(f"row {number} of the manifest {path} has no path: {row}")
        label = row[label_column].strip() if label_column is not None and len(row) > label_column else ""
        out.append((entry, label))
    return out


def _read_parquet(path: str) -> Rows:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow, or write the manifest as CSV")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema, read_table

    try:
        names = {name.lower(): name for name in read_schema(path).names}
        path_name = next((names[name] for name in PATH_COLUMNS if name in names), None)
        if path_name is None:
            raise DataError(f"the manifest {path} has no path column ({', '.join(PATH_COLUMNS)}), but {sorted(names)}")
        label_name = next((names[name] for name in LABEL_COLUMNS if name in names), None)
        table = read_table(path, columns=[name for name in (path_name, label_name) if name is not None])
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read the manifest {path}: {error}") from error
    paths = table[path_name].to_pylist()
    labels = table[label_name].to_pylist() if label_name is not None else [None] * len(paths)
    if None in paths:
        raise DataError(f"row {paths.index(None) + 1} of the manifest {path} has no path")
    return [(os.fspath(entry), "" if label is None else str(label)) for entry, label in zip(paths, labels, strict=True)]


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
