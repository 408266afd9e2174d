"""Matches regular expressions from an adapter's configuration within limits.

Patterns come from the folder and aren't trusted: one that backtracks without end would hold up every request,
a count in braces takes memory in proportion, and a thousand patterns on a thousand modules are a million
matches. But most patterns are plain module names, which are looked up; only the others are matched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar

import regex

T = TypeVar("T")

MAX_PATTERN = 4096
"""Limit of a pattern, in characters."""
MAX_REPEATS = 10_000
"""Largest product of a pattern's counts: the library copies in memory what is repeated."""
MAX_PATTERNS = 512
"""Limit of one option's patterns that aren't plain names."""
_MATCH_SECONDS = 0.05
_OPTION_SECONDS = 0.2
"""For matching all patterns of one option against one name."""
_LOAD_SECONDS = 5.0
_GROUPS = 32

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}?")
_COUNT = re.compile(r"(\d*)(?:,(\d*))?")


class BadPattern(ValueError):
    """Not a regular expression, one beyond the limits, or one that takes too long."""


class Form(Enum):
    """Where PEFT searches a module's name for a pattern, as the expression that it builds for this."""

    WHOLE = "{}"
    KEY = r"(.*\.)?({})$"  # of rank and alpha patterns
    ENDING = r".*\.{}$"  # not in parentheses there either
    WITHIN = r"(^|.*\.){}($|\..*)"  # of modules to save
    ANYWHERE = r".*?(?:{})"
    LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

    def around(self, pattern: str) -> str:
        """The expression to match from the name's start."""
        return self.value.replace("{}", pattern)


class Matching:
    """Matches one load's patterns, and bounds the time that this takes in total."""

    def __init__(self, seconds: float = _LOAD_SECONDS) -> None:
        self._left = seconds
        self._compiled: dict[tuple[Form, str], regex.Pattern[str]] = {}

    def match(self, form: Form, pattern: str, name: str) -> regex.Match[str] | None:
        """Match a pattern against a name. Raises BadPattern."""
        compiled = self._compiled.get((form, pattern)) or self.compile(form, pattern)
        match = compiled.fullmatch if form is Form.WHOLE else compiled.match
        return self._timed(lambda: match(name, timeout=min(_MATCH_SECONDS, max(self._left, 0.001))))

    def compile(self, form: Form, pattern: str) -> regex.Pattern[str]:
        """Compile a pattern once. Raises BadPattern."""
        if (form, pattern) not in self._compiled:
            check_pattern(pattern)
            self._compiled[form, pattern] = self._timed(lambda: _compile(form, pattern))
        return self._compiled[form, pattern]

    @property
    def left(self) -> float:
        """Seconds that the load has left."""
        return self._left

    def _timed(self, work: Callable[[], T]) -> T:
        if self._left <= 0:
            raise BadPattern("its patterns take too long")
        started = time.thread_time()
        try:
            return work()
        except TimeoutError:
            raise BadPattern("it takes too long") from None
        except (regex.error, re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise BadPattern(str(error) or type(error).__name__) from None
        finally:
            self._left -= time.thread_time() - started


def check_pattern(pattern: str) -> None:
    """Refuse patterns that are expensive to compile, and those that PEFT's library (`re`) reads differently.

    Raises:
        BadPattern.
    """
    if len(pattern) > MAX_PATTERN:
        raise BadPattern(f"it has {len(pattern)} characters, the limit is {MAX_PATTERN}")
    repeats = 1
    for braces in _BRACES.finditer(_ESCAPED.sub("x", pattern)):
        count = _COUNT.fullmatch(braces[1])
        if count is None:
            raise BadPattern(f"{braces[0]!r} in it isn't a count")
        digits = max(count[1], count[2] or "", key=lambda number: (len(number), number))
        repeats *= max(1, int(digits[:9] or 0))
    if repeats > MAX_REPEATS:
        raise BadPattern(f"its counts multiply to more than {MAX_REPEATS}")


def _compile(form: Form, pattern: str) -> regex.Pattern[str]:
    whole = form.around(pattern)
    re.compile(whole)  # PEFT uses re, so a pattern that only regex accepts has no meaning
    return regex.compile(whole)


class KeyPatterns:
    """Finds the first of an option's patterns that matches a module's name.

    Args:
        form: where a pattern must match; not LAYER.

    Raises:
        BadPattern: there are too many.
    """

    def __init__(self, patterns: Iterable[str], form: Form, matching: Matching) -> None:
        self._form = form
        self._matching = matching
        # Plain patterns by length, then by the positions of their unescaped dots, which match any character,
        # then by their text: the first such pattern.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, tuple[int, str]]]] = {}
        self._general: list[tuple[int, str]] = []
        for at, pattern in enumerate(patterns):
            if not self._add_plain(at, pattern):
                self._general.append((at, pattern))
        if len(self._general) > MAX_PATTERNS:
            raise BadPattern(f"{len(self._general)} of them aren't plain names, the limit is {MAX_PATTERNS}")

    def _add_plain(self, at: int, pattern: str) -> bool:
        if self._form in (Form.ANYWHERE, Form.LAYER, Form.WHOLE) or _PLAIN.fullmatch(pattern) is None:
            return False
        if pattern[0] == "^" or pattern[-1] == "$":
            return False
        name, places = "", []
        for part in re.findall(r"\\?.", pattern):
            if part == ".":
                places.append(len(name))
            name += part[-1]
        groups = self._plain.setdefault(len(name), {})
        if tuple(places) not in groups and len(groups) >= _GROUPS:
            return False
        groups.setdefault(tuple(places), {}).setdefault(name, (at, pattern))
        return True

    def first(self, name: str) -> str | None:
        """The first pattern that matches. Raises BadPattern."""
        best: tuple[int, str] | None = None
        for span in self._spans(name):
            for places, patterns in self._plain.get(len(span), {}).items():
                found = patterns.get(_with_dots(span, places))
                if found is not None and (best is None or found < best):
                    best = found
        spent = 0.0
        for at, pattern in self._general:
            if best is not None and at > best[0]:
                break
            self._matching.compile(self._form, pattern)  # once, and not part of the time for a name
            before = self._matching.left
            if self._matching.match(self._form, pattern, name):
                return pattern
            spent += before - self._matching.left
            if spent > _OPTION_SECONDS:
                raise BadPattern("they take too long")
        return None if best is None else best[1]

    def _spans(self, name: str) -> Iterator[str]:
        """The parts of a name that a plain pattern may equal."""
        starts = [0, *(at + 1 for at, character in enumerate(name) if character == ".")]
        for start in starts[1:] if self._form is Form.ENDING else starts:
            yield name[start:]
            if self._form is Form.WITHIN:
                yield from (name[start : end - 1] for end in starts if end > start + 1)


class OptionByModule:
    """An option with values by pattern, such as `rank_pattern`."""

    def __init__(self, values: Mapping[str, Any], form: Form, matching: Matching) -> None:
        self._values = values
        self._form = form
        self._matching = matching
        self._patterns: KeyPatterns | None = None

    @property
    def values(self) -> Collection[Any]:
        """All values, whether or not a module has them."""
        return self._values.values()

    def of(self, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the module's name. Raises BadPattern."""
        if self._patterns is None:
            self._patterns = KeyPatterns(self._values, self._form, self._matching)
        key = self._patterns.first(module)
        if self._form is Form.ENDING and key is None and module in self._values:
            key = module
        return default if key is None else self._values[key]


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    for place in places:
        text = f"{text[:place]}.{text[place + 1 :]}"
    return text


def endings(name: str) -> Iterator[str]:
    """A module's name and its rest after each dot, which PEFT compares targets with."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
