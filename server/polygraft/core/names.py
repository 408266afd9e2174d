"""What an adapter may be called."""

from __future__ import annotations

import re

from polygraft.errors import InvalidRequest

STACK = "_stack"
"""What metrics call several adapters of one request; no adapter can have it for a name."""
STACK_KIND = "stack"
"""Their kind."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(name: str) -> bool:
    """Whether an adapter can have this name."""
    return _NAME.fullmatch(name) is not None


NOT_A_NAME = f"an adapter's name must match {_NAME.pattern}"


def check_name(name: str, field: str = "name") -> str:
    """The name, checked.

    Args:
        field: path of the request's field that it came in.

    Raises:
        InvalidRequest: no adapter can have it.
    """
    if not is_name(name):
        shown = repr(name if len(name) <= 40 else name[:40] + "...")
        hint = "; leave out the white space around it" if is_name(name.strip()) else ""
        raise InvalidRequest(field, f"must match {_NAME.pattern}, got {shown}{hint}")
    return name
