"""Tries adapters' chat templates with small chats before they are served, each template once."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polygraft.engine.sandbox.frames import Frame
from polygraft.engine.sandbox.pool import TRIAL_CPU_SECONDS, WORKER_BYTES, Workers, key_of
from polygraft.engine.sandbox.process import WorkerStopped, WorkerUnavailable
from polygraft.errors import AdapterInvalid, ResourceExhausted

MAX_TEMPLATE_BYTES = 2**18
"""Jinja takes 8 s to compile a MiB; templates of real models have some tens of KiB."""
_CHATS = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ],
)
_MOST_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What is wrong with a template, if anything, and warnings for the operator."""

    problem: str | None = None
    warnings: tuple[str, ...] = ()


class TemplateTrials:
    """May be called on any thread; blocks while a worker renders."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._known: dict[str, _Outcome] = {}
        self._lock = threading.Lock()

    def try_out(
        self, name: str, source: str, variables: Mapping[str, Any], most_characters: int
    ) -> tuple[str, ...]:
        """Render small chats with a template; returns warnings.

        Args:
            name: the adapter's, for errors.
            source, variables, most_characters: as of `WorkerTemplate`.

        Raises:
            AdapterInvalid: it is too large, isn't Jinja, or exceeds the limits of a small chat.
            ResourceExhausted: no worker is free.
        """
        key = key_of(json.dumps([source, dict(variables), most_characters]).encode())
        with self._lock:
            outcome = self._known.get(key)
        if outcome is None:
            outcome = self._outcome(source, variables, most_characters)
            with self._lock:
                self._known[key] = outcome
                if len(self._known) > _MOST_REMEMBERED:
                    self._known.pop(next(iter(self._known)))
        if outcome.problem is not None:
            raise AdapterInvalid(name, [outcome.problem])
        return outcome.warnings

    def _outcome(self, source: str, variables: Mapping[str, Any], most_characters: int) -> _Outcome:
        try:
            size = len(source.encode())
        except UnicodeEncodeError:
            return _Outcome("its chat template isn't text: it holds half a character")
        if size > MAX_TEMPLATE_BYTES:
            return _Outcome(f"its chat template has {size} bytes, the limit is {MAX_TEMPLATE_BYTES}")
        warnings: list[str] = []
        for chat in _CHATS:
            try:
                answer = self._workers.render(source, chat, variables, most_characters, TRIAL_CPU_SECONDS)
            except WorkerStopped as error:
                return _Outcome(f"its chat template {error.problem} with a small chat")
            except WorkerUnavailable as error:
                raise ResourceExhausted(
                    f"no process to try chat templates can be started: {error}"
                ) from error
            match answer.header.get("failed"):
                case "memory":
                    most = WORKER_BYTES // 2**20
                    return _Outcome(
                        f"its chat template needs more than {most} MiB of memory with a small chat"
                    )
                case "broken":
                    return _Outcome(f"its chat template can't be read{_said(answer)}")
                case "fault":
                    warnings.append(f"its chat template fails with a small chat{_said(answer)}")
                case "refusal":
                    warnings.append(f"its chat template refuses a small chat{_said(answer)}")
                case "long":
                    warnings.append("its chat template turns a small chat into more than fits the context")
        return _Outcome(warnings=tuple(warnings[:1]))


def _said(answer: Frame) -> str:
    line = answer.header.get("line")
    where = f" (line {line})" if isinstance(line, int) else ""
    return f"{where}: {answer.header.get('problem')}"
