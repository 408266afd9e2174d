"""Which modules of the base an adapter's configuration targets.

The rules are PEFT's own (`check_target_module_exists` and `get_pattern_key` in peft/tuners/tuners_utils.py
and peft/utils/other.py, 0.21): an adapter must land on the same modules here as there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import regex

from polygraft.adapters.reader import FolderReader, shown
from polygraft.base.spec import BaseSpec

ALL_LINEAR = "all-linear"

_MATCH_SECONDS = 0.05
"""A pattern comes from the folder, and one that backtracks without end would hold up every request."""

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Those that PEFT takes for the names of embeddings (peft/utils/constants.py, EMBEDDING_LAYER_NAMES)."""

BAD_PATTERN = (regex.error, TimeoutError)
"""What matching raises: not a regular expression, or one that takes too long."""


def matches(pattern: str, name: str, *, whole: bool) -> regex.Match[str] | None:
    """`re.fullmatch` or `re.match` within a limited time. Raises one of `BAD_PATTERN`."""
    match = regex.fullmatch if whole else regex.match
    return match(pattern, name, timeout=_MATCH_SECONDS)


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter's configuration targets.

    Args:
        modules: in the base's order.
        named: modules that `target_modules` names, those included that another option takes out again.
        kept: modules that `exclude_modules` and `layers_to_transform` leave in, named or not; None is all.
        by_pattern: `target_modules` is a regular expression.
    """

    modules: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    kept: frozenset[str] | None = None
    by_pattern: bool = False


def target_modules(reader: FolderReader, base: BaseSpec, also: Collection[str] = ()) -> list[str]:
    """The modules that `find_targets` finds."""
    return list(find_targets(reader, base, also).modules)


def find_targets(
    reader: FolderReader, base: BaseSpec, also: Collection[str] = (), *, required: bool = True
) -> Targets:
    """Take the targeting options and return what they target, noting targets that don't exist or can't be
    served. What is in `modules_to_save` is no target.

    Args:
        also: modules other than linear ones that the kind is served on.
        required: whether there must be any.
    """
    targets = reader.option("target_modules", (str, list), None)
    excluded = reader.option("exclude_modules", (str, list), [])
    layers = reader.option("layers_to_transform", (int, list), None)
    patterns = reader.option("layers_pattern", (str, list), [])
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not targets:
        if required:
            reader.problems.append("target_modules is empty")
        return Targets()
    # PEFT refuses these as well.
    if isinstance(targets, str) and (layers or patterns):
        reader.problems.append("layers_to_transform and layers_pattern go with a list of target_modules")
    elif patterns and not layers:
        reader.problems.append("layers_pattern without layers_to_transform has no meaning")
    names = [*base.linears, *base.others]
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    try:
        if all_linear:
            named = found = [name for name, shape in base.linears.items() if not shape.is_head]
            missing = []
        else:
            named = [name for name in names if _named(name, targets)]
            found = [name for name in names if _targeted(name, targets, layers, patterns)]
            each = [targets] if isinstance(targets, str) else [[target] for target in targets]
            missing = [one for one in each if not any(_named(name, one) for name in names)]
        found = [name for name in found if not _named(name, excluded) and not _within(name, reader.saved)]
        kept = None
        if layers or excluded:
            kept = frozenset(
                name
                for name in names
                if not _named(name, excluded) and (not layers or _layer(name, patterns) in layers)
            )
    except BAD_PATTERN as error:
        reader.problems.append(
            "target_modules, exclude_modules or layers_pattern is not a regular expression that can be "
            f"matched: {error}"
        )
        return Targets()
    for target in missing:
        culprit = target if isinstance(target, str) else target[0]
        reader.problems.append(f"target {shown(culprit)} matches no module of the base")
    if not found and not missing:
        reader.problems.append("exclude_modules or layers_to_transform leaves no module of the base")
    reader.problems += [
        f"target {name} is a {base.others[name]}, which this kind isn't served on"
        for name in found
        if name in base.others and name not in also
    ]
    served = tuple(name for name in found if name in base.linears or name in also)
    return Targets(served, frozenset(named), kept, isinstance(targets, str) and not all_linear)


def with_tied_head(reader: FolderReader, base: BaseSpec, targets: list[str]) -> list[str]:
    """The targets, and where `ensure_weight_tying` says so the embedding and the head that it is tied to.

    The head's weights are the embedding's then, exchanged and transposed, and PEFT saves them under both
    names (peft/tuners/lora/model.py, `_add_targets_to_tie`).
    """
    embeddings = set(EMBEDDING_NAMES)
    if not reader.ties or not any(name.split(".")[-1] in embeddings for name in targets):
        return targets
    if any(ending.split(".")[-1] in embeddings for ending in reader.saved):
        return targets
    return list(dict.fromkeys((*targets, *base.token_modules)))


def matching_key(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern of a rank or alpha pattern that fits the module's name.

    Raises: one of `BAD_PATTERN`.
    """
    return next((p for p in patterns if matches(rf"(.*\.)?({p})$", module, whole=False)), None)


def ending_key(patterns: Iterable[str], module: str) -> str | None:
    """The pattern of a kind that looks for the name's last part only, or for the whole name as it is.

    Raises: one of `BAD_PATTERN`.
    """
    known = list(patterns)
    first = next((p for p in known if matches(rf".*\.{p}$", module, whole=False)), None)
    return module if first is None and module in known else first


def _named(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return matches(targets, name, whole=True) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _within(name: str, saved: Iterable[str]) -> bool:
    """Whether a module is one of those to save, or in one."""
    return any(matches(rf"(^|.*\.){one}($|\..*)", name, whole=False) for one in saved)


def _targeted(
    name: str, targets: str | Sequence[str], layers: Sequence[int] | None, patterns: Sequence[str]
) -> bool:
    if isinstance(targets, str) or name in targets or not layers:
        return _named(name, targets)  # a module that is named in full is targeted in any layer
    return _named(name, targets) and _layer(name, patterns) in layers


def _layer(name: str, patterns: Sequence[str]) -> int | None:
    if not patterns:
        match = matches(r".*?\.[^.]*\.(?P<idx>\d+)\.", name, whole=False)
    else:
        tries = (matches(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name, whole=False) for pattern in patterns)
        match = next((m for m in tries if m), None)
    return int(match["idx"]) if match else None
