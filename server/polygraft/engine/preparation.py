"""Where requests are prepared: at once if that takes a moment, else on a thread that suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from polygraft.engine.engine import Engine
from polygraft.engine.fair_workers import FairWorkers
from polygraft.engine.prompts import Prompts
from polygraft.engine.request import AdapterRef, Chat, Request, ScoreRequest
from polygraft.engine.scoring import ScoreJob
from polygraft.engine.sequence import Generation
from polygraft.engine.worker import Worker
from polygraft.errors import AdapterNotFound, InvalidRequest

T = TypeVar("T")
P = TypeVar("P", Generation, ScoreJob)

QUICK = 4_096
"""Size up to which the event loop does it itself: some 3 ms."""
LARGE = 65_536
"""Size from which on a request waits behind others of its kind alone: it takes some 50 ms and more."""
_MAX_LARGE = 32
_FOREIGN_THREADS = 8
_FOREIGN_SHARE = 4
"""What the prompts of one adapter with words of its own may take of the queue: a part in so many."""
_MOST_SCORED = 2**24
"""Characters that one request may have tokenized: they take some seconds."""
_MESSAGE = 64
"""What a chat's message costs beside its text, in characters."""
_ID = 0.25
"""What a token id costs, in characters."""


class Preparation:
    """Turns requests into tokens, and tokens into text, without holding the event loop up.

    There are queues with a thread each, so that nobody waits behind what takes much longer: one for common
    requests, one for large ones, and one for each adapter that brings a tokenizer or a template along, which
    nobody has vouched for; the threads of these mostly wait for the process that runs it. Small requests
    don't wait at all: they are prepared where they arrive.

    Args:
        max_waiting: most common requests that wait.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine = engine
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

    async def generation(self, request: Request) -> Generation:
        """Prepare a request. Raises: as `Engine.prepare`, and ResourceExhausted if too many wait."""
        return await self._prepare(request, _size(request.prompt), lambda: self._engine.prepare(request))

    async def score(self, request: ScoreRequest) -> ScoreJob:
        """The same for continuations to score. Raises InvalidRequest as well if that is too much at once."""
        # Text is tokenized together with each of them.
        texts = sum(isinstance(continuation, str) for continuation in request.continuations)
        size = _size(request.prompt) * max(1, texts) + sum(map(_size, request.continuations))
        if size > _MOST_SCORED:
            raise InvalidRequest(
                "continuations",
                f"with the prompt before each they are {size:.0f} characters, more than {_MOST_SCORED}: "
                "send fewer at a time",
            )
        return await self._prepare(request, size, lambda: self._engine.prepare_score(request))

    async def _prepare(self, request: Request | ScoreRequest, size: float, prepare: Callable[[], P]) -> P:
        self._requests.add(request.id)
        try:
            foreign = self._foreign_of(request.adapters)
            # Whoever gives up meanwhile must not leave adapters pinned.
            return await self._run(size, prepare, foreign=foreign, release=lambda lost: lost.stack.release())
        finally:
            self._requests.discard(request.id)

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef]) -> tuple[int, ...]:
        """See `EngineHandle.tokenize`."""
        return await self._run(
            _size(prompt),
            lambda: tuple(self.prompts_of(adapters).token_ids(prompt)),
            foreign=self._foreign_of(adapters),
        )

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef]) -> str:
        """See `EngineHandle.detokenize`."""
        return await self._run(
            len(token_ids),
            lambda: self.prompts_of(adapters).decode(token_ids),
            foreign=self._foreign_of(adapters),
        )

    def prompts_of(self, adapters: Sequence[AdapterRef]) -> Prompts:
        """Tokenizer and template of requests with these adapters. Raises as `Intake.resolve`."""
        stack = self._engine.intake.resolve(adapters)
        try:
            return self._engine.prompts.of(stack)
        finally:
            stack.release()

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
            size: of what it works on, in characters.
            foreign: the adapter whose own tokenizer or template it uses, which may take seconds.
            release: as of `Worker.run`.
        """
        if foreign is not None:
            return await self._foreign.run(foreign, call, release=release)
        if size <= QUICK:
            return call()
        return await (self._common if size < LARGE else self._large).run(call, release=release)

    def _foreign_of(self, adapters: Sequence[AdapterRef]) -> str | None:
        return next((ref.name for ref in adapters if self._brings_prompts(ref)), None)

    def _brings_prompts(self, ref: AdapterRef) -> bool:
        try:
            return ref.generation is not None or self._engine.adapters.registry.get(ref.name).own_prompts
        except AdapterNotFound:
            return False


def _size(prompt: str | tuple[int, ...] | Chat) -> float:
    """How much there is to do for a prompt, in characters."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, tuple):
        return len(prompt) * _ID
    return sum(len(message.content) + len(message.role) + _MESSAGE for message in prompt.messages)
