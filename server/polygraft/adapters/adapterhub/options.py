"""The options of one method in an AdapterHub configuration: what nobody takes is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown

_WHY: Mapping[str, str] = {
    "use_gating": "its gate averages over all tokens of a call, so a row would depend on its neighbours",
}
_NEVER: tuple[Any, ...] = (None, False, [], {}, "")


class Options:
    """One block of options, with a record of what has been taken.

    Args:
        where: the block's name in problems, such as "config".
    """

    def __init__(self, reader: FolderReader, values: Mapping[str, Any], where: str) -> None:
        self._reader = reader
        self._values = dict(values)
        self._where = where

    def take(self, key: str, expected: type | tuple[type, ...], default: Any) -> Any:
        """Take a value. One of the wrong type is a problem, and so is null where it isn't the default: the
        library reads null as false, whatever it stands for; the default serves on."""
        if key not in self._values:
            return default
        value = self._values.pop(key)
        types = expected if isinstance(expected, tuple) else (expected,)
        is_right = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
        if is_right or (value is None and default is None):
            return value
        self.refuse(key, value, "has the wrong type")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """Take a truth value."""
        value: bool = self.take(key, bool, default)
        return value

    def layers_left_out(self) -> frozenset[int]:
        """Take `leave_out`: indices of layers that the method leaves alone."""
        listed = self.take("leave_out", list, [])
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in listed):
            self.refuse("leave_out", listed, "must hold layers' indices")
            return frozenset()
        return frozenset(listed)

    def ignore(self, *keys: str) -> None:
        """Pass over options that have no effect on what the adapter computes once it is trained."""
        for key in keys:
            self._values.pop(key, None)

    def refuse(self, key: str, value: object, why: str) -> None:
        """Note that a value can't be served."""
        self._reader.problems += self.problem(key, value, why).texts

    def problem(self, key: str, value: object, why: str) -> OptionProblem:
        """Return the problem that a value can't be served, to be raised."""
        return OptionProblem(f"{self._where}.{key} {why}: {shown(value)}")

    def finish(self) -> None:
        """Note what nobody has taken and isn't off."""
        for key, value in sorted(self._values.items()):
            if value not in _NEVER:
                why = f": {_WHY[key]}" if key in _WHY else ""
                self._reader.problems.append(f"{self._where}.{key[:200]}={shown(value)} isn't served{why}")
