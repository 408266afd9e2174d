"""Numbers of bytes as people write them: 268435456, 256MiB, 1.5GB."""

from __future__ import annotations

from typing import Any

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def parse_bytes(value: Any) -> Any:
    """Read a number of bytes with a unit; anything else is returned as it is, for the type's own check."""
    if isinstance(value, str):
        for unit, factor in _UNITS.items():
            if value.endswith(unit):
                try:
                    return int(float(value[: -len(unit)]) * factor)
                except (ValueError, OverflowError):
                    return value
    return value


def shown_bytes(count: int) -> str:
    """The shortest text that `parse_bytes` reads as exactly this number."""
    for unit in ("GiB", "MiB", "KiB"):
        if count and count % _UNITS[unit] == 0:
            return f"{count // _UNITS[unit]}{unit}"
    return str(count)
