"""What the server and a worker say to each other: a JSON object and some named bytes behind it.

A frame is two lengths (4 bytes each, most significant first), then so many bytes of JSON and so many of
parts. The header says how long each part is, under `parts`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 2**26
"""A chat's messages travel in the header of a question, six bytes for a character at most."""


class BadFrame(Exception):
    """The other side says something that isn't a frame, or a larger one than is allowed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Args:
        header: what JSON can hold.
        parts: bytes by name.
    """

    header: Mapping[str, Any]
    parts: Mapping[str, bytes] = field(default_factory=dict)


def pack(frame: Frame) -> bytes:
    """A frame's bytes."""
    header = json.dumps({**frame.header, "parts": {name: len(part) for name, part in frame.parts.items()}})
    body = b"".join(frame.parts.values())
    return _LENGTHS.pack(len(header), len(body)) + header.encode() + body


def read(take: Callable[[int], bytes], max_header: int, max_body: int) -> Frame | None:
    """Read a frame; None where the other side has ended.

    Args:
        take: returns exactly so many bytes, or fewer where there will be no more.
        max_header, max_body: most bytes of either; more aren't read.

    Raises:
        BadFrame: it isn't one, or is too large, or ends in the middle.
    """
    lengths = take(_LENGTHS.size)
    if not lengths:
        return None
    if len(lengths) < _LENGTHS.size:
        raise BadFrame("it ends in the middle")
    header_bytes, body_bytes = _LENGTHS.unpack(lengths)
    if header_bytes > max_header or body_bytes > max_body:
        raise BadFrame(f"{header_bytes} and {body_bytes} bytes, at most {max_header} and {max_body} are read")
    raw, body = take(header_bytes), take(body_bytes)
    if len(raw) < header_bytes or len(body) < body_bytes:
        raise BadFrame("it ends in the middle")
    try:
        header = json.loads(raw)
        sizes = header.pop("parts")
        parts = {}
        at = 0
        for name, size in sizes.items():
            parts[name] = body[at : at + size]
            at += size
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadFrame(f"its header can't be read: {error}") from None
    if at != body_bytes:
        raise BadFrame("its parts have other lengths than its body")
    return Frame(header, parts)
