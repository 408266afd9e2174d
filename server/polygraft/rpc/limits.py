"""Size limits for messages of methods that need less than the server's own limit."""

from __future__ import annotations

from polygraft.engine.client import ModelInfo
from polygraft.errors import InvalidRequest

_SMALL = 16 * 1024
"""For names, paths and page tokens."""
_ROOM = 64 * 1024
"""For all fields except the one that grows with the context."""
_BYTES_PER_ID = 6
"""At most, with a tag of its own."""

_DETOKENIZE = "/polygraft.v1.InferenceService/Detokenize"
_GET_MODEL = "/polygraft.v1.InferenceService/GetModel"
_SMALL_SERVICES = ("/polygraft.v1.AdapterService/", "/grpc.health.v1.Health/", "/grpc.reflection.")


class MessageLimits:
    """Checks messages against the most that their method could need, before they are parsed."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model

    def check(self, method: str, size: int) -> None:
        """Raise InvalidRequest for a message of more bytes than its method could need."""
        limit = self._of(method)
        if limit is not None and size > limit:
            raise InvalidRequest("request", f"{size} bytes, {method} takes at most {limit}")

    def _of(self, method: str) -> int | None:
        if method == _DETOKENIZE:
            return self._model.context_length * _BYTES_PER_ID + _ROOM
        if method == _GET_MODEL or method.startswith(_SMALL_SERVICES):
            return _SMALL
        return None
