"""InferenceService on top of an engine."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from polygraft.engine.client import EngineClient
from polygraft.engine.workers.worker import Worker
from polygraft.errors import Draining
from polygraft.rpc import requests, responses
from polygraft.rpc.access_log import note_adapters, note_finished, note_unfinished
from polygraft.rpc.answer import QUICK_ENTRIES, Answer, encode, entries
from polygraft.telemetry.logging import request_id
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc
from polygraft_types.requests import AdapterRef

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

_QUICK_ELEMENTS = 500
"""Up to so many messages of a chat, or continuations, the event loop converts itself, in some 2 ms."""
_QUICK_TOKENS = 8_192


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates between the contract and the engine; errors are the interceptor's to map.

    Args:
        handle: the engine.
        requests: converts requests that would block the event loop.
        answers: builds answers; its queue has room for every call that this servicer has begun.
    """

    def __init__(self, handle: EngineClient, requests: Worker, answers: Worker) -> None:
        self._handle = handle
        self._requests = requests
        self._answers = answers
        self._numbers = itertools.count()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Generate the whole answer: a stream's last message."""
        answer = self._answer(request)
        async with aclosing(self._chunks(request, answer)) as chunks:
            async for _ in chunks:
                pass
        return await answer.whole()

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Generate chunk by chunk; closing this generator aborts the request."""
        answer = self._answer(request)
        async with aclosing(self._chunks(request, answer)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.token_ids or chunk.logprobs:
                    yield chunk
        yield await answer.final_chunk()

    def _answer(self, request: pb.GenerateRequest) -> Answer:
        return Answer(self._answers, want_ids=request.response.token_ids)

    async def _chunks(
        self, request: pb.GenerateRequest, answer: Answer
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """All chunks but the last. Afterwards `answer` has that one, and the whole."""
        call, unique = self._ids()
        model = self._handle.model
        domain = await self._convert(request, lambda: requests.generate_request(request, unique, model))
        _note(domain.adapters)
        tokens = 0
        try:
            async with aclosing(self._handle.generate(domain)) as outputs:
                async for output in outputs:
                    if output.error is not None:
                        raise output.error
                    tokens += len(output.token_ids)
                    chunk = await answer.chunk(output)
                    if output.finished is not None:
                        note_finished(output.finished)
                        answer.finish(output.finished, call)
                        return
                    yield chunk
        finally:
            if tokens:
                note_unfinished(tokens)
        raise RuntimeError("the engine ended a request without saying how")

    async def _convert(self, message: Message, call: Callable[[], T]) -> T:
        if requests.elements(message) <= _QUICK_ELEMENTS:
            return call()
        return await self._requests.run(call)

    def _ids(self) -> tuple[str, str]:
        """The call's id, and the engine's for it: the caller may choose a call's id and choose it again while
        the engine still drops the first."""
        call = request_id.get()
        return call, f"{call}/{next(self._numbers)}"

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        """Log-likelihoods of continuations; cancelling this aborts the request."""
        call, unique = self._ids()
        model = self._handle.model
        domain = await self._convert(request, lambda: requests.score_request(request, unique, model))
        _note(domain.adapters)
        output = await self._handle.score(domain)
        finished = output.finished
        if finished is None or not output.scores:
            raise Draining("the server is shutting down")
        note_finished(finished)
        count = sum(1 + entries(score.tokens) for score in output.scores)
        if count <= QUICK_ENTRIES:
            return responses.scores(output, finished, call)
        made = await self._answers.run(lambda: responses.scores(output, finished, call))
        return await encode(self._answers, made, count * responses.ENTRY_BYTES)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text to token ids."""
        model = self._handle.model
        prompt, adapters = await self._convert(request, lambda: requests.tokenize_request(request, model))
        _note(adapters)
        ids = await self._handle.tokenize(prompt, adapters)
        if len(ids) <= _QUICK_TOKENS:
            return pb.TokenizeResponse(token_ids=ids)
        made = await self._answers.run(lambda: pb.TokenizeResponse(token_ids=ids))
        return await encode(self._answers, made, len(ids) * responses.ID_BYTES)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Token ids to text."""
        ids, adapters = requests.detokenize_request(request, self._handle.model)
        _note(adapters)
        return pb.DetokenizeResponse(text=await self._handle.detokenize(ids, adapters))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """What is being served."""
        adapters = requests.adapter_refs(request)
        _note(adapters)
        return responses.model(self._handle.model_for(adapters))


def _note(adapters: Sequence[AdapterRef]) -> None:
    note_adapters(*(ref.name for ref in adapters))
