"""A real gRPC server on a free port whose answers the test writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from polygraft_api.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE = "polygraft.v1.InferenceService"
ADAPTERS = "polygraft.v1.AdapterService"


def status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    violations: Sequence[tuple[str, str]] = (),
    retry_after: float | None = None,
    metadata: dict[str, str] | None = None,
) -> grpc.Status:
    """A status with google.rpc details, as the server sends it."""
    details: list[Any] = []
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="polygraft", metadata=metadata))
    if violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [PackedAny() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


def adapter(name: str, **fields: Any) -> adapters_pb2.Adapter:
    """A LoRA that is ready, but for `fields`."""
    known: dict[str, Any] = {
        "generation": 3,
        "state": adapters_pb2.ADAPTER_STATE_READY,
        "kind": "lora",
        "primitives": ["low_rank"],
        "modules": 60,
        "rank": 8,
        "parameters": 921_600,
        "disk_bytes": 1_850_000,
        "compiled_bytes": 1_843_200,
        "source": name,
        "content_hash": "ab" * 32,
        "load_time": Timestamp(seconds=1_700_000_000),
        "load_seconds": 0.25,
    }
    return adapters_pb2.Adapter(name=name, **(known | fields))


LOGPROB = inference_pb2.TokenLogprob(
    token_id=10,
    text="one",
    logprob=-0.25,
    top=[inference_pb2.TopLogprob(token_id=11, text="two", logprob=-0.125)],
)
FIRST = inference_pb2.TokenLogprob(token_id=9, text="H")


class Script:
    """What the server answers, and what it was asked."""

    def __init__(self) -> None:
        self.words = ["one ", "two ", "three"]
        self.adapters = [adapter("headline"), adapter("mood")]
        self.nearest: list[adapters_pb2.NearestTokens] = []
        self.page_size = 100
        self.failures: list[grpc.Status] = []  # each fails one call, in order
        self.hold: threading.Event | None = None  # generations wait for it after their first word
        self.arrived = threading.Event()  # a call did
        self.ended = threading.Event()  # a call did; of a held generation: its caller has gone
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.has_chat_template = True
        self.with_template: set[str] = set()  # adapters that bring a chat template along

    def receive(self, request: Any, context: grpc.ServicerContext) -> None:
        """Note a call, and fail it if the script says so."""
        self.requests.append(request)
        self.arrived.set()
        if not context.add_callback(self.ended.set):
            self.ended.set()
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        if self.failures:
            context.abort_with_status(self.failures.pop(0))

    def wait(self, context: grpc.ServicerContext) -> None:
        """Hold a generation until the test or the caller ends it."""
        if self.hold is None:
            return
        while not self.hold.wait(0.01) and context.is_active():
            pass

    def answer(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        """The whole answer, which shows whose it is."""
        text = "".join(self.words)
        return inference_pb2.GenerateResponse(
            text=f"{request.adapter.upper()} {text}" if request.adapter else text,
            token_ids=[10, 11, 12] if request.response.token_ids else [],
            logprobs=[FIRST, LOGPROB] if request.response.logprobs else [],
            summary=inference_pb2.GenerateSummary(
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                usage=inference_pb2.Usage(prompt_tokens=5, virtual_tokens=2, completion_tokens=3),
                timings=inference_pb2.Timings(queue=0.25, prefill=0.5, time_to_first_token=0.75, total=1.5),
                adapter_generation=3 if request.adapter else 0,
                lora_path=inference_pb2.LORA_PATH_UNMERGED,
                seed=7,
                stop_token_id=2,
                preemptions=1,
                request_id="r-1",
                adapter_generations=[3 + at for at in range(len(request.adapters))],
            ),
        )


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def Generate(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        self._script.wait(context)
        return self._script.answer(request)

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self._script.receive(request, context)
        answer = self._script.answer(request)
        prefix = answer.text.removesuffix("".join(self._script.words))
        for index, word in enumerate(self._script.words):
            text = prefix + word if index == 0 else word
            ids = [10 + index] if request.response.token_ids else []
            logprobs = [LOGPROB] if request.response.logprobs else []
            yield inference_pb2.GenerateStreamResponse(text=text, token_ids=ids, logprobs=logprobs)
            self._script.wait(context)
        yield inference_pb2.GenerateStreamResponse(final=answer)

    def Score(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        count = len(request.continuations) + len(request.continuation_token_ids)
        return inference_pb2.ScoreResponse(
            scores=[
                inference_pb2.ContinuationScore(log_likelihood=-1.5 - at, is_greedy=at == 0, tokens=[LOGPROB])
                for at in range(count)
            ],
            usage=inference_pb2.Usage(prompt_tokens=5, cached_tokens=1, completion_tokens=3),
            timings=inference_pb2.Timings(queue=0.25, total=1.5),
            adapter_generation=3 if request.adapter else 0,
            lora_path=inference_pb2.LORA_PATH_UNMERGED,
            request_id="r-2",
        )

    def Tokenize(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        text = request.prompt or "".join(m.content for m in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=[ord(c) for c in text])

    def Detokenize(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def GetModel(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        return inference_pb2.GetModelResponse(
            model="default",
            architecture="llama",
            dtype="bfloat16",
            quantization="none",
            device="cpu",
            context_length=8192,
            vocabulary_size=49152,
            parameters=134_515_008,
            weight_bytes=269_030_016,
            eos_token_ids=[2],
            default_sampling=inference_pb2.SamplingOptions(
                temperature=0.0, top_p=1.0, repetition_penalty=1.1
            ),
            has_chat_template=self._script.has_chat_template
            or bool(self._script.with_template & {request.adapter, *(one.name for one in request.adapters)}),
            server_version="0.1.0",
            notes=["a note"],
        )


class _Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def LoadAdapter(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        return adapters_pb2.LoadAdapterResponse(adapter=adapter(request.name, source=request.source))

    def UnloadAdapter(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        return adapters_pb2.UnloadAdapterResponse(adapter=adapter(request.name))

    def ReloadAdapter(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        return adapters_pb2.ReloadAdapterResponse(adapter=adapter(request.name, generation=4))

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        found = next((a for a in self._script.adapters if a.name == request.name), None)
        if found is None:
            text = f"adapter {request.name!r}: not registered"
            context.abort_with_status(status(grpc.StatusCode.NOT_FOUND, text, reason="ADAPTER_NOT_FOUND"))
        nearest = self._script.nearest if request.nearest_tokens else []
        return adapters_pb2.GetAdapterResponse(adapter=found, nearest_tokens=nearest)

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self._script.receive(request, context)
        size = request.page_size or self._script.page_size
        start = int(request.page_token or 0)
        rest = self._script.adapters[start:]
        return adapters_pb2.ListAdaptersResponse(
            adapters=rest[:size],
            next_page_token=str(start + size) if len(rest) > size else "",
            total_size=len(self._script.adapters),
        )


class ScriptedServer:
    """Runs a script on a port of its own while the context lasts."""

    def __init__(self, options: Sequence[tuple[str, Any]] = ()) -> None:
        self.script = Script()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=options)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(self.script), self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(_Adapters(self.script), self._server)
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.health.set(INFERENCE, HealthCheckResponse.NOT_SERVING)
        reflection.enable_server_reflection([INFERENCE, ADAPTERS, reflection.SERVICE_NAME], self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.script.hold is not None:
            self.script.hold.set()
        self._server.stop(None).wait()
        self._pool.shutdown()
