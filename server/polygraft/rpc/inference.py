"""InferenceService on top of an engine."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from polygraft.engine.handle import EngineHandle
from polygraft.errors import Draining
from polygraft.rpc import convert, messages
from polygraft.telemetry.logging import request_id
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates between the contract and the engine; errors are the interceptor's to map.

    Args:
        handle: the engine.
    """

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle
        self._numbers = itertools.count()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Generate the whole answer: a stream's last message."""
        async with aclosing(self.GenerateStream(request, context)) as chunks:
            async for chunk in chunks:
                if chunk.HasField("final"):
                    return chunk.final
        raise AssertionError("a stream ends with its final message or with an error")

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Generate chunk by chunk; closing this generator aborts the request."""
        call, unique = self._ids()
        domain = convert.generate_request(request, unique, self._handle.model)
        want_ids = request.response.token_ids
        whole = pb.GenerateResponse()
        texts: list[str] = []
        async with aclosing(self._handle.generate(domain)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                texts.append(output.text)
                chunk = pb.GenerateStreamResponse(
                    text=output.text, logprobs=messages.logprobs(output.logprobs)
                )
                if want_ids:
                    chunk.token_ids.extend((*output.prompt_ids, *output.token_ids))
                whole.token_ids.extend(chunk.token_ids)
                whole.logprobs.extend(chunk.logprobs)
                if output.finished is not None:
                    whole.text = "".join(texts)
                    whole.summary.CopyFrom(messages.summary(output.finished, call))
                    chunk.final.CopyFrom(whole)
                    yield chunk
                    return
                if chunk.text or chunk.token_ids or chunk.logprobs:
                    yield chunk
        raise RuntimeError("the engine ended a request without saying how")

    def _ids(self) -> tuple[str, str]:
        """The call's id, and the engine's for it: the caller may choose a call's id and choose it again while
        the engine still drops the first."""
        call = request_id.get()
        return call, f"{call}/{next(self._numbers)}"

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        """Log-likelihoods of continuations; cancelling this aborts the request."""
        call, unique = self._ids()
        domain = convert.score_request(request, unique, self._handle.model)
        output = await self._handle.score(domain)
        if output.finished is None or not output.scores:
            raise Draining("the server is shutting down")
        return messages.scores(output, output.finished, call)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text to token ids."""
        prompt, adapters = convert.tokenize_request(request)
        return pb.TokenizeResponse(token_ids=await self._handle.tokenize(prompt, adapters))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Token ids to text."""
        adapters = convert.adapter_refs(request)
        return pb.DetokenizeResponse(text=await self._handle.detokenize(request.token_ids, adapters))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """What is being served."""
        return messages.model(self._handle.model_for(convert.adapter_refs(request)))
