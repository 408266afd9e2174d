"""Which modules of the base an adapter's configuration targets.

The rules are PEFT's own (`check_target_module_exists` and `get_pattern_key` in peft/tuners/tuners_utils.py
and peft/utils/other.py, 0.21): an adapter must land on the same modules here as there.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass

from polygraft.adapters.files.patterns import BadPattern, Form, KeyPatterns, Matching, endings
from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.core.adapter_weights import Targets
from polygraft.core.spec import BaseSpec

ALL_LINEAR = "all-linear"

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Those that PEFT takes for the names of embeddings (peft/utils/constants.py, EMBEDDING_LAYER_NAMES)."""

MAX_LAYER_PATTERNS = 64
_NAMES_A_SLICE = 64
_SLICE_SECONDS = 0.01


def target_modules(reader: FolderReader, base: BaseSpec, also: Collection[str] = ()) -> list[str]:
    """The modules that `find_targets` finds."""
    return list(find_targets(reader, base, also).modules)


def find_targets(
    reader: FolderReader, base: BaseSpec, also: Collection[str] = (), *, required: bool = True
) -> Targets:
    """Take the targeting options and return the targets, noting those that can't be served. Modules in
    `modules_to_save` are no targets. As in PEFT, a target that doesn't exist is a warning if others do.

    Args:
        also: modules other than linear ones that the kind is served on.
        required: whether there must be any.
    """
    if reader.choice is None:
        for _ in choose(reader, base):
            pass
    choice: Choice | None = reader.choice
    assert choice is not None
    if choice.is_empty and required:
        reader.problems.append("target_modules is empty")
    if choice.is_empty or choice.is_bad:
        return Targets()
    note = reader.warnings if choice.found else reader.problems
    for target in choice.missing:
        note.append(f"target {shown(target)} matches no module of the base")
    if not choice.found and not choice.missing:
        reader.problems.append("exclude_modules or layers_to_transform leaves no module of the base")
    reader.problems += [
        f"target {name} is a {base.others[name]}, which this kind isn't served on"
        for name in choice.found
        if name in base.others and name not in also
    ]
    served = tuple(name for name in choice.found if name in base.linears or name in also)
    return Targets(served, frozenset(choice.named), choice.kept, choice.by_pattern)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the targeting options mean on a base, whichever modules the kind supports.

    Args:
        is_empty: they name nothing.
        is_bad: they are invalid, which has been noted.
        named, kept, by_pattern: as in `Targets`.
        found: the named modules that the other options leave.
        missing: targets that match nothing.
    """

    is_empty: bool = False
    is_bad: bool = False
    named: Sequence[str] = ()
    found: Sequence[str] = ()
    missing: Sequence[str] = ()
    kept: frozenset[str] | None = None
    by_pattern: bool = False


def choose(reader: FolderReader, base: BaseSpec) -> Generator[None, None, None]:
    """Take the targeting options and store what they mean in `reader.choice`. Works in slices: it yields
    where it may be interrupted. The work is linear in the options and in the base's modules."""
    options = _Options(reader)
    if not options.targets:
        reader.choice = Choice(is_empty=True)
        return
    reader.choice = Choice(is_bad=True)
    with reader.noting():
        options.check()
        try:
            reader.choice = yield from _chosen(reader, base, options)
        except BadPattern as error:
            raise OptionProblem(
                "target_modules, exclude_modules or layers_pattern is not a regular expression that can be "
                f"matched: {error}"
            ) from None


class _Options:
    """Takes the targeting options."""

    def __init__(self, reader: FolderReader) -> None:
        self.targets: str | list[str] = reader.option("target_modules", (str, list), None)
        self.excluded: str | list[str] = reader.option("exclude_modules", (str, list), [])
        self.layers: int | list[object] | None = reader.option("layers_to_transform", (int, list), None)
        patterns = reader.option("layers_pattern", (str, list), [])
        self.patterns: list[str] = [patterns] if isinstance(patterns, str) else patterns

    def check(self) -> None:
        """Raise OptionProblem for what PEFT refuses as well, and for more patterns than are served."""
        all_layers = self.layers in (None, [])
        if isinstance(self.targets, str) and (not all_layers or self.patterns):
            raise OptionProblem("layers_to_transform and layers_pattern go with a list of target_modules")
        if self.patterns and all_layers:
            raise OptionProblem("layers_pattern without layers_to_transform has no meaning")
        named = {
            "target_modules": self.targets,
            "exclude_modules": self.excluded,
            "layers_pattern": self.patterns,
        }
        for key, value in named.items():
            if isinstance(value, list) and not all(isinstance(one, str) for one in value):
                raise OptionProblem(f"{key} must hold names: {shown(value)}")
        if len(self.patterns) > MAX_LAYER_PATTERNS:
            raise OptionProblem(
                f"layers_pattern has {len(self.patterns)} entries, the limit is {MAX_LAYER_PATTERNS}"
            )


def _chosen(reader: FolderReader, base: BaseSpec, options: _Options) -> Generator[None, None, Choice]:
    """Raises BadPattern."""
    targets, excluded = options.targets, options.excluded
    layers = _Layers(reader, options.layers, options.patterns)
    names = [*base.linears, *base.others]
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    is_target = _Named(targets, reader.matching)
    is_excluded = _Named(excluded, reader.matching)
    saved = KeyPatterns(reader.saved, Form.WITHIN, reader.matching)
    named: list[str] = []
    found: list[str] = []
    kept: set[str] = set()
    narrowed = layers.given or bool(excluded)
    left = reader.matching.left
    for at, name in enumerate(names):
        if at % _NAMES_A_SLICE == 0 or left - reader.matching.left > _SLICE_SECONDS:
            yield
            left = reader.matching.left
        shape = base.linears.get(name)
        wanted = (shape is not None and not shape.is_head) if all_linear else is_target(name)
        if not wanted and not narrowed:
            continue
        left_in = not is_excluded(name)
        in_layers = layers.include(name)
        if left_in and in_layers:
            kept.add(name)
        if wanted:
            named.append(name)
            # A module named in full is a target whatever its layer.
            if left_in and (in_layers or is_target.in_full(name)) and saved.first(name) is None:
                found.append(name)
    return Choice(
        named=named,
        found=found,
        missing=[] if all_linear else is_target.unmatched(names),
        kept=frozenset(kept) if narrowed else None,
        by_pattern=isinstance(targets, str) and not all_linear,
    )


class _Named:
    """Whether a module is named by a regular expression, or by a list of whole names and ends of names."""

    def __init__(self, targets: str | Sequence[str], matching: Matching) -> None:
        self._pattern = targets if isinstance(targets, str) else None
        self._list = () if isinstance(targets, str) else targets
        self._names = frozenset(self._list)
        self._matching = matching
        self._matched = False

    def __call__(self, name: str) -> bool:
        """Raises BadPattern."""
        if self._pattern is None:
            return any(ending in self._names for ending in endings(name))
        if not self._pattern:
            return False
        found = self._matching.match(Form.WHOLE, self._pattern, name) is not None
        self._matched |= found
        return found

    def in_full(self, name: str) -> bool:
        """Whether a list contains the whole name."""
        return name in self._names

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Targets that match none of these names; call it after asking about all of them."""
        if self._pattern is not None:
            return [] if self._matched else [self._pattern]
        known = {ending for name in names for ending in endings(name)}
        return [target for target in dict.fromkeys(self._list) if target not in known]


class _Layers:
    """The layers that `layers_to_transform` and `layers_pattern` include.

    Args:
        layers: None or an empty list for all.
    """

    def __init__(self, reader: FolderReader, layers: int | list[object] | None, patterns: list[str]) -> None:
        self.given = layers not in (None, [])
        several = layers if isinstance(layers, list) else [layers]
        self._layers = frozenset(layer for layer in several if isinstance(layer, int))
        self._patterns = patterns
        self._matching = reader.matching

    def include(self, name: str) -> bool:
        """Raises BadPattern."""
        return not self.given or self._of(name) in self._layers

    def _of(self, name: str) -> int | None:
        if not self._patterns:
            match = self._matching.match(Form.WHOLE, _FIRST_NUMBER, name)
        else:
            tries = (self._matching.match(Form.LAYER, pattern, name) for pattern in self._patterns)
            match = next((m for m in tries if m), None)
        return int(match["idx"]) if match else None


_FIRST_NUMBER = r".*?\.[^.]*\.(?P<idx>\d+)\..*"


def with_tied_head(reader: FolderReader, base: BaseSpec, targets: Sequence[str]) -> Sequence[str]:
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
