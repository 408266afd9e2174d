"""A request's unread outputs: joined, and weighed so that they can be bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from polygraft.core.output import RequestOutput

PIECE = 16 * 1024
"""Bytes taken at once if there are more: as much as a client's connection accepts without waiting."""
_GATHER = 64
"""Outputs that are kept one by one; more are joined, since each has more overhead than content."""
_OUTPUT = 200
_ID = 36
_LOGPROB = 160
_TOP = 110


def weight(output: RequestOutput) -> int:
    """The memory of an output, roughly, in bytes; an error counts 0, since it must come through."""
    if output.error is not None:
        return 0
    entries = len(output.logprobs) * _LOGPROB
    if output.logprobs:
        entries += sum(len(token.top) for token in output.logprobs) * _TOP
    return _OUTPUT + len(output.text) + (len(output.token_ids) + len(output.prompt_ids)) * _ID + entries


def join(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        prompt_ids=outputs[0].prompt_ids,
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
    )


class Unread:
    """One request's outputs that wait for its reader. `bytes` is the memory they take."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def add(self, output: RequestOutput) -> None:
        """Append an output."""
        self._outputs.append(output)
        self.bytes += weight(output)
        if len(self._outputs) >= _GATHER and output.error is None:
            self._outputs = [join(self._outputs)]
            self.bytes = weight(self._outputs[0])

    def take(self) -> RequestOutput:
        """The first output, joined with the next ones that fit in a piece; there must be one."""
        count, size = 0, 0
        for output in self._outputs:
            size += weight(output)
            # An error carries no output, so what comes before it is read first.
            if count and (size > PIECE or output.error is not None):
                break
            count += 1
        taken, self._outputs = self._outputs[:count], self._outputs[count:]
        self.bytes = sum(map(weight, self._outputs))
        return join(taken)

    def clear(self) -> None:
        """Forget all."""
        self._outputs.clear()
        self.bytes = 0
