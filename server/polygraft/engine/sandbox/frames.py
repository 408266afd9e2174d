"""The messages between the server and a worker: a JSON object followed by named byte strings, the parts.

A frame is two big-endian 4-byte lengths, the JSON header and the parts in one body. The header has each
part's length under `parts`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 2**26
"""A question's header has the chat's messages, at most six bytes per character."""


class BadFrame(Exception):
    """The other side sent something that isn't a frame, or too large a frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Args:
        header: anything that JSON can hold.
        parts: bytes by name.
    """

    header: Mapping[str, Any]
    parts: Mapping[str, bytes] = field(default_factory=dict)


def pack(frame: Frame) -> bytes:
    """A frame as bytes."""
    header = json.dumps({**frame.header, "parts": {name: len(part) for name, part in frame.parts.items()}})
    body = b"".join(frame.parts.values())
    return _LENGTHS.pack(len(header), len(body)) + header.encode() + body


def read(take: Callable[[int], bytes], max_header: int, max_body: int) -> Frame | None:
    """Read a frame; None at the end of the input.

    Args:
        take: returns exactly so many bytes, or fewer at the end of the input.
        max_header, max_body: most bytes of each; more aren't read.

    Raises:
        BadFrame: it is malformed, too large or truncated.
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
