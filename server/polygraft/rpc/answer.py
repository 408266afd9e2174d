"""Builds a generation's messages, off the event loop if they are large."""

from __future__ import annotations

from typing import TypeVar, cast

from google.protobuf.message import Message

from polygraft.core.output import RequestOutput
from polygraft.engine.workers.worker import Worker
from polygraft.rpc import responses
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_types.answers import Finished, TokenLogprob

M = TypeVar("M", bound=Message)

QUICK_ENTRIES = 500
"""Up to so many log-probabilities the event loop builds the messages itself, in some 2 ms."""
_QUICK_BYTES = 65_536
"""Up to about so many bytes it serializes itself."""


def entries(tokens: tuple[TokenLogprob, ...]) -> int:
    """How many messages these log-probabilities become."""
    return sum(1 + len(token.top) for token in tokens)


class Answer:
    """Turns each of a generation's outputs into a chunk, and all of them into the final message.

    Args:
        worker: builds and serializes messages that would block the event loop.
        want_ids: whether token ids are sent.
    """

    def __init__(self, worker: Worker, *, want_ids: bool) -> None:
        self._worker = worker
        self._want_ids = want_ids
        self._texts: list[str] = []
        # Collected in the message that is sent, since a copy at the end would cost as much again.
        self._last = pb.GenerateStreamResponse()
        self._bytes = 0

    async def chunk(self, output: RequestOutput) -> pb.GenerateStreamResponse:
        """The message of one output. The last one also holds the final message; see `finish`."""
        chunk = self._last if output.finished is not None else pb.GenerateStreamResponse()
        whole = self._last.final
        chunk.text = output.text
        self._texts.append(output.text)
        if self._want_ids:
            ids = (*output.prompt_ids, *output.token_ids)
            chunk.token_ids.extend(ids)
            whole.token_ids.extend(ids)
            self._bytes += len(ids) * responses.ID_BYTES
        if output.logprobs:
            count = entries(output.logprobs)
            self._bytes += count * responses.ENTRY_BYTES

            def add() -> None:
                chunk.logprobs.extend(responses.logprobs(output.logprobs))
                whole.logprobs.extend(chunk.logprobs)

            if count <= QUICK_ENTRIES:
                add()
            else:
                await self._worker.run(add)
        return chunk

    def finish(self, finished: Finished, request_id: str) -> None:
        """Complete the final message."""
        whole = self._last.final
        whole.text = "".join(self._texts)
        self._bytes += len(whole.text)
        whole.summary.CopyFrom(responses.summary(finished, request_id))

    async def final_chunk(self) -> pb.GenerateStreamResponse:
        """A stream's last message."""
        return await encode(self._worker, self._last, 2 * self._bytes)

    async def whole(self) -> pb.GenerateResponse:
        """A unary call's only message."""
        return await encode(self._worker, self._last.final, self._bytes)


async def encode(worker: Worker, message: M, size: int) -> M:
    """The message, or its bytes, if serializing it would block the event loop.

    Servicers return either as if it were the message; the interceptor sends bytes as they are.

    Args:
        size: of the message, roughly, in bytes.
    """
    if size <= _QUICK_BYTES:
        return message
    return cast("M", await worker.run(message.SerializeToString))
