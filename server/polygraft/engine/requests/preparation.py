"""Prepares requests: at once if that is quick, otherwise on a thread for requests of their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from polygraft.engine.requests.input_processor import Intake
from polygraft.engine.requests.scoring import ScoreJob
from polygraft.engine.sequences.generate import GenerateSequence
from polygraft.engine.workers.fair_workers import FairWorkers
from polygraft.engine.workers.worker import Worker
from polygraft.errors import InvalidRequest
from polygraft_types.requests import AdapterRef, Chat, Request, ScoreRequest

T = TypeVar("T")
P = TypeVar("P", GenerateSequence, ScoreJob)

QUICK = 4_096
"""The event loop itself prepares requests up to this size, in some 3 ms."""
LARGE = 65_536
"""Requests from this size on have a queue of their own: they take 50 ms and more."""
_MAX_LARGE = 32
_FOREIGN_THREADS = 8
_FOREIGN_SHARE = 4
"""An adapter with its own tokenizer or template may have `max_waiting` divided by this waiting."""
_MOST_SCORED = 2**24
"""Limit in characters of what one score tokenizes, which takes some seconds."""
_MESSAGE = 64
"""The cost of a chat message beside its text, in characters."""
_ID = 0.25
"""The cost of a token id, in characters."""


class Preparation:
    """Turns requests into tokens, and tokens into text, without blocking the event loop.

    Small requests are prepared on the event loop and never wait. Others wait only behind their like: common
    and large ones have a queue and a thread each, and so does each adapter with an untrusted tokenizer or
    template of its own; their threads are shared and mostly wait for worker processes.

    Args:
        max_waiting: most common requests that wait.
    """

    def __init__(self, intake: Intake, max_waiting: int) -> None:
        self._intake = intake
        self._common = Worker("prompts", max_waiting)
        self._large = Worker("large prompts", _MAX_LARGE)
        self._foreign = FairWorkers(
            "prompts of adapters' own tokenizers and templates",
            _FOREIGN_THREADS,
            max(1, max_waiting // _FOREIGN_SHARE),
        )
        self._requests: set[str] = set()

    def __len__(self) -> int:
        """Requests that are being prepared."""
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id is being prepared."""
        return request_id in self._requests

    async def generation(self, request: Request) -> GenerateSequence:
        """Prepare a request. Raises: as `Intake.prepare`, and ResourceExhausted if too many wait."""
        size = _size(request.prompt)
        return await self._prepare(request, size, lambda: self._intake.prepare(request))

    async def score(self, request: ScoreRequest) -> ScoreJob:
        """The same for continuations to score. Also raises InvalidRequest if they are too much at once."""
        # Text is tokenized together with each of them.
        texts = sum(isinstance(continuation, str) for continuation in request.continuations)
        size = _size(request.prompt) * max(1, texts) + sum(map(_size, request.continuations))
        if size > _MOST_SCORED:
            raise InvalidRequest(
                "continuations",
                f"with the prompt before each they have {size:.0f} characters, more than {_MOST_SCORED}: "
                "send fewer at a time",
            )
        return await self._prepare(request, size, lambda: self._intake.prepare_score(request))

    async def _prepare(self, request: Request | ScoreRequest, size: float, prepare: Callable[[], P]) -> P:
        self._requests.add(request.id)
        try:
            foreign = self._foreign_of(request.adapters)
            # A caller that gives up meanwhile must not leave adapters pinned.
            return await self._run(size, prepare, foreign=foreign, release=lambda lost: lost.stack.release())
        finally:
            self._requests.discard(request.id)

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef]) -> tuple[int, ...]:
        """See `EngineClient.tokenize`."""
        return await self._run(
            _size(prompt),
            lambda: tuple(self._intake.prompts_of(adapters).token_ids(prompt)),
            foreign=self._foreign_of(adapters),
        )

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef]) -> str:
        """See `EngineClient.detokenize`."""
        return await self._run(
            len(token_ids),
            lambda: self._intake.prompts_of(adapters).decode(token_ids),
            foreign=self._foreign_of(adapters),
        )

    async def _run(
        self,
        size: float,
        call: Callable[[], T],
        *,
        foreign: str | None = None,
        release: Callable[[T], None] | None = None,
    ) -> T:
        """Run a call on the thread that suits it.

        Args:
            size: of its input, in characters.
            foreign: the adapter whose own tokenizer or template it uses, which may take seconds.
            release: as of `Worker.run`.
        """
        if foreign is not None:
            return await self._foreign.run(foreign, call, release=release)
        if size <= QUICK:
            return call()
        return await (self._common if size < LARGE else self._large).run(call, release=release)

    def _foreign_of(self, adapters: Sequence[AdapterRef]) -> str | None:
        return next((ref.name for ref in adapters if self._intake.may_bring_prompts(ref)), None)


def _size(prompt: str | tuple[int, ...] | Chat) -> float:
    """The cost of preparing a prompt, in characters."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, tuple):
        return len(prompt) * _ID
    return sum(len(message.content) + len(message.role) + _MESSAGE for message in prompt.messages)
