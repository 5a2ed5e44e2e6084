"""Configuration of a command: YAML files and dotted options onto a tree of dataclasses, with errors that name the
nearest key.

jsonargparse parses, types and documents; this module checks keys first, because it can say where an unknown one is
and what was probably meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from vjepa.cli import UsageError

Config = TypeVar("Config")

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def build_parser(command: str, description: str, config_class: type) -> ArgumentParser:
    """A parser with --config, --debug and one dotted option for each field of `config_class`, a dataclass tree."""
    usage = f"vjepa {command} [--config FILE.yaml] [--section.key value ...]"
    parser = ArgumentParser(
        prog=f"vjepa {command}", usage=usage, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE.yaml",
        help="YAML file with any of the options below, which win over it; the recipes are in the repository's configs/",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(config_class)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str], config_class: type) -> Namespace:
    """Parses `argv`; a problem is a UsageError of one sentence: which option or key, what was expected, what came."""
    files, options = split_config_files(argv)
    trees = {file: read_yaml(file) for file in files}
    for file, tree in trees.items():
        check_keys(tree, config_class, file)
    options = join_values(options, config_class)
    ordered = [argument for file in files if trees[file] for argument in ("--config", file)] + options
    try:
        return parser.parse_args(ordered)
    except argparse.ArgumentError as error:
        raise UsageError(_readable(str(error), parser, config_class, trees, options)) from error


def split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of --config and the other arguments: options win over files wherever they stand on the line."""
    files, others = [], []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config":
            value = next(rest, None)
            if value is None:
                raise UsageError("--config: expected a YAML file, got nothing")
            files.append(value)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


def join_values(options: Sequence[str], config_class: type) -> list[str]:
    """`--data.path A B` as the list that `--data.path '["A", "B"]'` is, for each option that may be a list of texts."""
    many = {f"--{key}" for key, hint in dotted_keys(config_class).items() if list[str] in get_args(hint)}
    joined: list[str] = []
    rest = deque(options)
    while rest:
        joined.append(rest.popleft())
        if joined[-1] in many:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.popleft())
            joined += [json.dumps(values)] if len(values) > 1 else values
    return joined


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; UsageError where there is none."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"--config: no file {path!r}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: cannot read {path!r}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree


def check_keys(tree: Mapping[Any, Any], config_class: type, source: str) -> None:
    """Raises UsageError for the first key of `tree` that is no field of `config_class`, naming the nearest that is."""
    _check_level(tree, config_class, "", source, list(dotted_keys(config_class)))


def _check_level(tree: Mapping[Any, Any], config_class: type, prefix: str, source: str, known: Sequence[str]) -> None:
    hints = typing.get_type_hints(config_class)
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in known and dotted.count(".") > prefix.count("."):
            continue  # "data.path: x" is as good as a nested key
        if key not in names:
            raise UsageError(f"{source}: unknown key {dotted!r}; did you mean {nearest_key(dotted, known)!r}?")
        inner = _dataclass_in(hints[key])
        if inner is None:
            continue
        if dataclasses.is_dataclass(hints[key]) and not isinstance(value, Mapping):
            raise UsageError(f"{source}: {dotted}: expected keys and values, got {value!r}")
        if isinstance(value, Mapping):
            _check_level(value, inner, f"{dotted}.", source, known)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    place = f"{dotted}[{number}]."
                    _check_level(
                        item, inner, place, source, [f"{place}{field.name}" for field in dataclasses.fields(inner)]
                    )


def dotted_keys(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass tree with its type: {"data.path": str | None, ...}."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys |= dotted_keys(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            keys[f"{prefix}{field.name}"] = hint
    return keys


def nearest_key(name: str, known: Sequence[str]) -> str:
    """The key of `known` most like `name`: same last part or its initials first, then the most similar spelling."""
    last = name.rpartition(".")[2]

    def likeness(key: str) -> float:
        own_last = key.rpartition(".")[2]
        if own_last in (last, _initials(last)) or last == _initials(own_last):
            return 1 + difflib.SequenceMatcher(None, name, key).ratio()
        lasts = difflib.SequenceMatcher(None, last, own_last).ratio()
        return max(difflib.SequenceMatcher(None, name, key).ratio(), 0.95 * lasts)

    return max(known, key=likeness)


def _initials(name: str) -> str:
    """learning_rate -> lr"""
    return "".join(word[:1] for word in name.split("_"))


def type_name(hint: Any) -> str:
    """A type in words: `float | None` is "a number or null"."""
    if hint in NAMES:
        return NAMES[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(one) for one in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list [{type_name(arguments[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(type_name, arguments))}]"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return str(getattr(hint, "__name__", hint))


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass a key holds, directly or as the items of a list."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((found for one in get_args(hint) if (found := _dataclass_in(one))), None)


def _readable(
    message: str, parser: ArgumentParser, config_class: type, trees: Mapping[str, Any], options: Sequence[str]
) -> str:
    """jsonargparse's message as one sentence in this project's words."""
    types_of = dotted_keys(config_class)
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        name = unknown[1].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {name!r}; options start with --"
        own = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        return f"unknown option {name!r}; did you mean '--{nearest_key(name.lstrip('-'), [*types_of, *own])}'?"
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"required and not given: {missing[1]}; give them in a --config file or as options"
    if refused := re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = f"{refused[1]}.{refused[2]}"
        return f"unknown key {name!r}; did you mean {nearest_key(name, list(types_of))!r}?"
    key = next((one for one in re.findall(r'"([\w.]+)"', message) if one in types_of), None)
    if key is None:
        return " ".join(message.split())
    value = re.search(r"Got value: (.*?)(?:\n|$)", message)
    place, given = _place(key, trees, options)
    return f"{place}: expected {type_name(types_of[key])}, got {value[1] if value else given!r}"


def _place(key: str, trees: Mapping[str, Any], options: Sequence[str]) -> tuple[str, Any]:
    """Where a key got its value, and the value: its option, or the last file that has it."""
    for number, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name.rstrip("+") == f"--{key}":
            return f"--{key}", value if equals else " ".join(options[number + 1 : number + 2])
    for file in reversed(list(trees)):
        level = trees[file]
        for part in key.split("."):
            level = level.get(part) if isinstance(level, Mapping) else None
        if level is not None:
            return f"{file}: {key}", level
    return key, None
