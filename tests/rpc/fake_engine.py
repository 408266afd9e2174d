"""An engine without a model: scripted tokens, adapters in a dict, failures on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from polygraft.core.output import RequestOutput
from polygraft.engine.client import ModelInfo
from polygraft.errors import AdapterNotFound, AdapterUnavailable, Draining, EngineDead, InvalidRequest
from polygraft_types.adapters import (
    AdapterInfo,
    AdapterState,
    Deviation,
    MergedInfo,
    MergeState,
    NearestToken,
)
from polygraft_types.answers import (
    ContinuationScore,
    Finished,
    FinishReason,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from polygraft_types.requests import AdapterRef, Chat, LoraPath, Request, SamplingParams, ScoreRequest

MODEL = ModelInfo(
    model="fake",
    architecture="llama",
    dtype="float32",
    quantization="none",
    device="cpu",
    context_length=128,
    vocabulary_size=1000,
    parameters=10,
    weight_bytes=40,
    kv_cache_bytes=1024,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    eos_token_ids=(0,),
    default_sampling=SamplingParams(temperature=0.5, top_p=0.9, top_k=20, min_p=0.1),
    has_chat_template=True,
    notes=("a note",),
)
LOGPROB = TokenLogprob(5, "five", -0.25, (TopLogprob(6, "six", -0.125),))


def ready(name: str, generation: int = 1, **fields: object) -> AdapterInfo:
    info = AdapterInfo(name, AdapterState.READY, source=name, generation=generation, kind="lora")
    return replace(info, **fields)  # type: ignore[arg-type]


class FakeEngine:
    """An `EngineClient`.

    `answer` is what every request generates, one piece a step. Requests pause after `pause_after`
    pieces until `resume` is set. `error` is raised before a request is queued, `late_error` once
    `pause_after` pieces have come out, `adapter_error` by every adapter command.
    """

    def __init__(self) -> None:
        self.model = MODEL
        self.failure: Exception | None = None
        self.answer: Sequence[str] = ("Hel", "", "lo ", "world")
        self.pause_after = 10**9
        self.resume = asyncio.Event()
        self.error: BaseException | None = None
        self.late_error: Exception | None = None
        self.adapter_error: Exception | None = None
        self.adapters = {"json": ready("json", 7), "shout": ready("shout", 8)}
        self.requests: list[Request] = []
        self.scores: list[ScoreRequest] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.dropped = asyncio.Event()
        self.paused = asyncio.Event()
        self.died = asyncio.Event()
        self.drained_with: list[float] = []
        self.loads: list[tuple[str, str]] = []
        self.asked_for: Sequence[AdapterRef] | None = None
        self.unloads: list[tuple[str, bool]] = []
        self._draining = False
        self._changed = asyncio.Event()

    async def until_running(self, count: int) -> None:
        while len(self.running) != count:
            self._changed.clear()
            await self._changed.wait()

    def die(self, cause: Exception) -> None:
        self.failure = cause
        self.died.set()
        self.resume.set()

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        if self._draining:
            raise Draining("the server is shutting down")
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        self.running.add(request.id)
        self._changed.set()
        done = False
        try:
            for number, text in enumerate(self.answer):
                if number == self.pause_after:
                    if self.late_error is not None:
                        done = True
                        raise self.late_error
                    self.paused.set()
                    await self.resume.wait()
                await asyncio.sleep(0)
                if self.failure is not None:
                    done = True
                    yield RequestOutput(request.id, error=EngineDead(str(self.failure)))
                    return
                last = number == len(self.answer) - 1
                done = last
                asked = request.response
                first = asked.echo and number == 0
                logprobs = (TokenLogprob(1, "<", None),) if first and asked.wants_logprobs else ()
                yield RequestOutput(
                    request.id,
                    f"<{text}" if first else text,
                    (100 + number,),
                    finished=self._finished(request) if last else None,
                    prompt_ids=(1,) if first else (),
                    logprobs=(*logprobs, LOGPROB) if asked.wants_logprobs else (),
                )
        finally:
            self.running.discard(request.id)
            self._changed.set()
            if not done:
                self.aborted.append(request.id)
                self.dropped.set()

    async def score(self, request: ScoreRequest) -> RequestOutput:
        if self.error is not None:
            raise self.error
        self.scores.append(request)
        self.running.add(request.id)
        done = False
        try:
            if self.pause_after == 0:
                self.paused.set()
                await self.resume.wait()
            done = True
        finally:
            self.running.discard(request.id)
            if not done:
                self.aborted.append(request.id)
                self.dropped.set()
        finished = Finished(
            reason=FinishReason.SCORED,
            usage=Usage(prompt_tokens=6, completion_tokens=2, cached_tokens=1, virtual_tokens=2),
            timings=Timings(total=0.4, queue=0.1, prefill=0.2, time_to_first_token=0.3),
            seed=0,
            path=LoraPath.UNMERGED,
            adapter_generations=tuple(range(7, 7 + len(request.adapters))),
        )
        scores = tuple(
            ContinuationScore(-0.5 - at, at == 0, (LOGPROB,)) for at in range(len(request.continuations))
        )
        return RequestOutput(request.id, finished=finished, scores=scores)

    def _finished(self, request: Request) -> Finished:
        return Finished(
            reason=FinishReason.STOP_SEQUENCE,
            usage=Usage(
                prompt_tokens=3, completion_tokens=len(self.answer), cached_tokens=1, virtual_tokens=2
            ),
            timings=Timings(total=0.4, queue=0.1, prefill=0.2, time_to_first_token=0.3),
            seed=request.sampling.seed,
            path=LoraPath.UNMERGED,
            adapter_generations=tuple(range(7, 7 + len(request.adapters))),
            stop_sequence="###",
            preemptions=1,
        )

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef] = ()) -> tuple[int, ...]:
        self.asked_for = adapters
        text = prompt if isinstance(prompt, str) else "".join(turn.content for turn in prompt.messages)
        return tuple(text.encode())

    def model_for(self, adapters: Sequence[AdapterRef]) -> ModelInfo:
        self.asked_for = adapters
        own = {ref.name for ref in adapters} & {"json"}
        return replace(self.model, eos_token_ids=(0, 7), has_chat_template=False) if own else self.model

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef] = ()) -> str:
        self.asked_for = adapters
        if any(token >= self.model.vocabulary_size for token in token_ids):
            raise InvalidRequest("token_ids", "out of range")
        return bytes(token_ids).decode()

    def _check(self) -> None:
        if self.adapter_error is not None:
            raise self.adapter_error

    async def load_adapter(self, name: str, source: str = "") -> AdapterInfo:
        self._check()
        self.loads.append((name, source))
        self.adapters[name] = ready(name, 9)
        return self.adapters[name]

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        self._check()
        self.unloads.append((name, wait))
        self.get_adapter(name)
        return self.adapters.pop(name)

    async def reload_adapter(self, name: str) -> AdapterInfo:
        self._check()
        info = self.get_adapter(name)
        self.adapters[name] = replace(info, generation=info.generation + 1)
        return self.adapters[name]

    async def update_adapter(self, name: str, *, merged: bool) -> AdapterInfo:
        self._check()
        info = self.get_adapter(name)
        copy = MergedInfo(MergeState.READY, merged, 100, "float32", 0.25, "", Deviation(0.5, 0.125, 0.75, 8))
        self.adapters[name] = replace(info, mergeable=True, merged=copy)
        return self.adapters[name]

    def get_adapter(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise AdapterNotFound(name, "not registered")
        return self.adapters[name]

    def list_adapters(self) -> list[AdapterInfo]:
        return sorted(self.adapters.values(), key=lambda info: info.name)

    async def nearest_tokens(self, name: str, count: int) -> list[list[NearestToken]]:
        if self.get_adapter(name).state != AdapterState.READY:
            raise AdapterUnavailable(name, "failed")
        return [[NearestToken(5, "five", 0.5)] * count] * 2

    async def wait_failed(self) -> None:
        await self.died.wait()

    async def drain(self, timeout: float) -> int:
        self.drained_with.append(timeout)
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self.until_running(0)
        except TimeoutError:
            left = len(self.running)
            self.failure = Draining("aborted")
            self.resume.set()
            return left
        return 0
