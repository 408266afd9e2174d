"""Where requests are prepared: at once if that takes a moment, else on a thread that suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from polygraft.engine.engine import Engine
from polygraft.engine.prompts import Prompts
from polygraft.engine.request import AdapterRef, Chat, Request, ScoreRequest
from polygraft.engine.scoring import ScoreJob
from polygraft.engine.sequence import Generation
from polygraft.engine.worker import Worker
from polygraft.errors import AdapterNotFound

T = TypeVar("T")
P = TypeVar("P", Generation, ScoreJob)

QUICK = 4_096
"""Size up to which the event loop does it itself: some 3 ms."""
LARGE = 65_536
"""Size from which on a request waits behind others of its kind alone: it takes some 50 ms and more."""
_MAX_LARGE = 32
_MAX_FOREIGN = 64
_MESSAGE = 64
"""What a chat's message costs beside its text, in characters."""
_ID = 0.25
"""What a token id costs, in characters."""


class Preparation:
    """Turns requests into tokens, and tokens into text, without holding the event loop up.

    There are three queues with a thread each, so that nobody waits behind what takes much longer: one for
    common requests, one for large ones, and one for the tokenizers and templates that adapters bring along,
    which nobody has vouched for. Small requests don't wait at all: they are prepared where they arrive.

    Args:
        max_waiting: most common requests that wait.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine = engine
        self._common = Worker("prompts", max_waiting)
        self._large = Worker("large prompts", _MAX_LARGE)
        self._foreign = Worker("prompts of adapters' own tokenizers and templates", _MAX_FOREIGN)
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
        """The same for continuations to score."""
        # Text is tokenized together with each of them.
        texts = sum(isinstance(continuation, str) for continuation in request.continuations)
        size = _size(request.prompt) * max(1, texts) + sum(map(_size, request.continuations))
        return await self._prepare(request, size, lambda: self._engine.prepare_score(request))

    async def _prepare(self, request: Request | ScoreRequest, size: float, prepare: Callable[[], P]) -> P:
        self._requests.add(request.id)
        try:
            foreign = self._is_foreign(request.adapters)
            # Whoever gives up meanwhile must not leave adapters pinned.
            return await self._run(size, prepare, foreign=foreign, release=lambda lost: lost.stack.release())
        finally:
            self._requests.discard(request.id)

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef]) -> tuple[int, ...]:
        """See `EngineHandle.tokenize`."""
        return await self._run(
            _size(prompt),
            lambda: tuple(self.prompts_of(adapters).token_ids(prompt)),
            foreign=self._is_foreign(adapters),
        )

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef]) -> str:
        """See `EngineHandle.detokenize`."""
        return await self._run(
            len(token_ids),
            lambda: self.prompts_of(adapters).decode(token_ids),
            foreign=self._is_foreign(adapters),
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
        foreign: bool = False,
        release: Callable[[T], None] | None = None,
    ) -> T:
        """Run a call on the thread that suits it.

        Args:
            size: of what it works on, in characters.
            foreign: whether it uses an adapter's own tokenizer or template, which may take any time.
            release: as of `Worker.run`.
        """
        if foreign:
            return await self._foreign.run(call, release=release)
        if size <= QUICK:
            return call()
        return await (self._common if size < LARGE else self._large).run(call, release=release)

    def _is_foreign(self, adapters: Sequence[AdapterRef]) -> bool:
        return any(self._brings_prompts(ref) for ref in adapters)

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
