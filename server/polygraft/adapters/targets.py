"""Which modules of the base an adapter's configuration targets.

The rules are PEFT's own (`check_target_module_exists` and `get_pattern_key` in peft/tuners/tuners_utils.py
and peft/utils/other.py, 0.21): an adapter must land on the same modules here as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from polygraft.adapters.reader import FolderReader
from polygraft.base.spec import BaseSpec

ALL_LINEAR = "all-linear"


def target_modules(reader: FolderReader, base: BaseSpec) -> list[str]:
    """Take the targeting options and return the targeted modules, noting targets that don't exist or
    can't be served."""
    targets = reader.option("target_modules", (str, list), None)
    excluded = reader.option("exclude_modules", (str, list), [])
    layers = reader.option("layers_to_transform", (int, list), None)
    patterns = reader.option("layers_pattern", (str, list), [])
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not targets:
        reader.problems.append("target_modules is empty")
        return []
    try:
        if targets == ALL_LINEAR:
            return [
                name
                for name, shape in base.linears.items()
                if not shape.is_head and not _named(name, excluded)
            ]
        found = [
            name
            for name in (*base.linears, *base.others)
            if _named(name, targets)
            and not _named(name, excluded)
            # PEFT applies layers_to_transform to lists only; a regular expression says it itself.
            and (isinstance(targets, str) or not layers or _layer(name, patterns) in layers)
        ]
    except re.error as error:
        reader.problems.append(f"target_modules or exclude_modules is not a regular expression: {error}")
        return []
    if isinstance(targets, str):
        missing = [] if found else [targets]
    else:
        missing = [target for target in targets if not any(_named(name, [target]) for name in found)]
    reader.problems += [f"target {target!r} matches no module of the base" for target in missing]
    reader.problems += [
        f"target {name} is a {base.others[name]}, which low-rank weights aren't served on"
        for name in found
        if name in base.others
    ]
    return [name for name in found if name in base.linears]


def matching_key(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern of a rank or alpha pattern that fits the module's name.

    Raises:
        re.error: a pattern is not a regular expression.
    """
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def _named(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _layer(name: str, patterns: Sequence[str]) -> int | None:
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        tries = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name) for pattern in patterns)
        match = next((m for m in tries if m), None)
    return int(match["idx"]) if match else None
