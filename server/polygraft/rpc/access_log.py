"""The access log: one line for each finished call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import grpc

from polygraft_types.answers import Finished

_log = logging.getLogger("polygraft.access")


@dataclass(slots=True)
class CallRecord:
    """The facts about one call that its line in the log shows; never texts of prompts or answers.

    Args:
        method: as /package.Service/Method.
        adapters: that the request names, in its order; for AdapterService the one it is about.
        finished: how a request ended, if it did.
        output_tokens: that a request had when its caller gave it up or it failed; None if it had none.
        reason: why the call failed, as in ErrorInfo.
    """

    method: str
    peer: str
    adapters: Sequence[str] = ()
    finished: Finished | None = None
    reason: str = ""
    output_tokens: int | None = None

    def fields(self, code: grpc.StatusCode, seconds: float) -> dict[str, str | int | float]:
        """The line's fields, in its order. Times are seconds; those that don't apply are left out."""
        fields: dict[str, str | int | float] = {"method": self.method.rpartition("/")[2], "code": code.name}
        if self.reason:
            fields["reason"] = self.reason
        if self.adapters:
            fields["adapter"] = "+".join(self.adapters)
        if (finished := self.finished) is not None:
            usage, timings = finished.usage, finished.timings
            fields |= {
                "path": finished.path.name.lower(),
                "finish": finished.reason.name.lower(),
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "output_tokens": usage.completion_tokens,
            }
            if timings.queue is not None:
                fields["queue_s"] = round(timings.queue, 4)
            if timings.time_to_first_token is not None:
                fields["first_token_s"] = round(timings.time_to_first_token, 4)
        elif self.output_tokens is not None:
            fields["output_tokens"] = self.output_tokens
        return fields | {"total_s": round(seconds, 4), "peer": self.peer}


_current: ContextVar[CallRecord | None] = ContextVar("call_record", default=None)


class AccessLog:
    """Writes the line of each call.

    Args:
        enabled: False writes nothing.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    def begin(self, method: str, peer: str) -> CallRecord:
        """Start the record of the current task's call."""
        record = CallRecord(method, peer)
        _current.set(record)
        return record

    def end(self, record: CallRecord, code: grpc.StatusCode, seconds: float) -> None:
        """Write the line."""
        if not self._enabled:
            return
        fields = record.fields(code, seconds)
        method, outcome, *rest = fields.items()
        shown = " ".join((f"{method[1]} {outcome[1]}", *(f"{name}={value}" for name, value in rest)))
        _log.info("%s", shown, extra={"fields": fields})


def note_adapters(*names: str) -> None:
    """Say which adapters the current call is for."""
    if (record := _current.get()) is not None:
        record.adapters = names


def note_finished(finished: Finished) -> None:
    """Say how the current call's request ended."""
    if (record := _current.get()) is not None:
        record.finished = finished


def note_unfinished(output_tokens: int) -> None:
    """Say how many tokens the current call's request had when it was given up or failed."""
    if (record := _current.get()) is not None:
        record.output_tokens = output_tokens
