"""Converts the contract's responses to this package's models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.wrappers_pb2 import Int32Value

from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client._models import (
    Adapter,
    Chunk,
    Generation,
    Health,
    MergedCopy,
    Model,
    SamplingDefaults,
    Score,
    Timings,
)
from polygraft_types.adapters import AdapterState, Deviation, MergeState, NearestToken
from polygraft_types.answers import ContinuationScore, FinishReason, TokenLogprob, TopLogprob, Usage
from polygraft_types.requests import LoraPath

_E = TypeVar("_E", bound=StrEnum)


def generation_from(response: inference_pb2.GenerateResponse) -> Generation:
    """Convert a whole answer."""
    summary = response.summary
    return Generation(
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=_named(
            FinishReason, "FINISH_REASON_", inference_pb2.FinishReason.Name, summary.finish_reason
        ),
        usage=_usage(summary.usage),
        timings=_timings(summary.timings),
        seed=summary.seed,
        adapter_generation=summary.adapter_generation,
        lora_path=_named(LoraPath, "LORA_PATH_", inference_pb2.LoraPath.Name, summary.lora_path),
        stop_sequence=summary.stop_sequence,
        stop_token_id=summary.stop_token_id if summary.HasField("stop_token_id") else None,
        preemptions=summary.preemptions,
        request_id=summary.request_id,
        logprobs=_logprobs(response.logprobs),
        adapter_generations=tuple(summary.adapter_generations),
    )


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        virtual_tokens=usage.virtual_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _timings(timings: inference_pb2.Timings) -> Timings:
    return Timings(
        queue=timings.queue,
        prefill=timings.prefill,
        time_to_first_token=timings.time_to_first_token,
        total=timings.total,
    )


def _logprobs(tokens: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token.token_id,
            token.text,
            token.logprob if token.HasField("logprob") else None,
            tuple(TopLogprob(near.token_id, near.text, near.logprob) for near in token.top),
        )
        for token in tokens
    )


def score_from(response: inference_pb2.ScoreResponse) -> Score:
    """Convert scores."""
    return Score(
        continuations=tuple(
            ContinuationScore(score.log_likelihood, score.is_greedy, _logprobs(score.tokens))
            for score in response.scores
        ),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
        adapter_generation=response.adapter_generation,
        lora_path=_named(LoraPath, "LORA_PATH_", inference_pb2.LoraPath.Name, response.lora_path),
        request_id=response.request_id,
        adapter_generations=tuple(response.adapter_generations),
    )


def chunk_from(response: inference_pb2.GenerateStreamResponse) -> Chunk:
    """Convert a piece of an answer."""
    return Chunk(
        text=response.text,
        token_ids=tuple(response.token_ids),
        generation=generation_from(response.final) if response.HasField("final") else None,
        logprobs=_logprobs(response.logprobs),
    )


def token_ids_from(response: inference_pb2.TokenizeResponse) -> tuple[int, ...]:
    """Convert token ids."""
    return tuple(response.token_ids)


def text_from(response: inference_pb2.DetokenizeResponse) -> str:
    """Convert text."""
    return response.text


def model_from(response: inference_pb2.GetModelResponse) -> Model:
    """Convert the description of the base model."""
    sampling = response.default_sampling
    return Model(
        model=response.model,
        architecture=response.architecture,
        dtype=response.dtype,
        quantization=response.quantization,
        device=response.device,
        context_length=response.context_length,
        vocabulary_size=response.vocabulary_size,
        parameters=response.parameters,
        weight_bytes=response.weight_bytes,
        kv_cache_bytes=response.kv_cache_bytes,
        max_num_seqs=response.max_num_seqs,
        max_num_batched_tokens=response.max_num_batched_tokens,
        eos_token_ids=tuple(response.eos_token_ids),
        default_sampling=SamplingDefaults(
            temperature=sampling.temperature if sampling.HasField("temperature") else None,
            top_p=sampling.top_p if sampling.HasField("top_p") else None,
            top_k=sampling.top_k if sampling.HasField("top_k") else None,
            min_p=sampling.min_p if sampling.HasField("min_p") else None,
            repetition_penalty=(
                sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None
            ),
            presence_penalty=sampling.presence_penalty if sampling.HasField("presence_penalty") else None,
            frequency_penalty=sampling.frequency_penalty if sampling.HasField("frequency_penalty") else None,
        ),
        has_chat_template=response.has_chat_template,
        server_version=response.server_version,
        notes=tuple(response.notes),
    )


def adapter_from(
    adapter: adapters_pb2.Adapter, nearest_tokens: tuple[tuple[NearestToken, ...], ...] = ()
) -> Adapter:
    """Convert an adapter."""
    return Adapter(
        name=adapter.name,
        generation=adapter.generation,
        state=_named(AdapterState, "ADAPTER_STATE_", adapters_pb2.AdapterState.Name, adapter.state),
        kind=adapter.kind,
        primitives=tuple(adapter.primitives),
        modules=adapter.modules,
        rank=adapter.rank,
        virtual_tokens=adapter.virtual_tokens,
        parameters=adapter.parameters,
        disk_bytes=adapter.disk_bytes,
        compiled_bytes=adapter.compiled_bytes,
        source=adapter.source,
        content_hash=adapter.content_hash,
        running_requests=adapter.running_requests,
        load_time=adapter.load_time.ToDatetime(tzinfo=UTC) if adapter.HasField("load_time") else None,
        load_seconds=adapter.load_seconds,
        problems=tuple(adapter.problems),
        warnings=tuple(adapter.warnings),
        mergeable=adapter.mergeable,
        merged_only=adapter.merged_only,
        own_prompts=adapter.own_prompts,
        merged=_merged_copy(adapter.merged) if adapter.HasField("merged") else None,
        nearest_tokens=nearest_tokens,
    )


def _merged_copy(copy: adapters_pb2.MergedCopy) -> MergedCopy:
    measured = copy.deviation
    return MergedCopy(
        state=_named(MergeState, "MERGE_STATE_", adapters_pb2.MergeState.Name, copy.state),
        pinned=copy.pinned,
        memory_bytes=copy.memory_bytes,
        dtype=copy.dtype,
        merge_seconds=copy.merge_seconds,
        problem=copy.problem,
        deviation=Deviation(measured.largest, measured.mean, measured.greedy_agreement, measured.positions)
        if copy.HasField("deviation")
        else None,
    )


def adapter_in(response: Any) -> Adapter:
    """Convert the adapter of any response that has one."""
    return adapter_from(response.adapter)


def adapter_with_nearest_tokens(response: adapters_pb2.GetAdapterResponse) -> Adapter:
    """Convert an adapter and its nearest tokens."""
    nearest = tuple(
        tuple(NearestToken(token.token_id, token.text, token.similarity) for token in virtual.tokens)
        for virtual in response.nearest_tokens
    )
    return adapter_from(response.adapter, nearest)


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """Some adapters, and the token of the next page; "" after the last."""

    adapters: tuple[Adapter, ...]
    next_page_token: str


def page_from(response: adapters_pb2.ListAdaptersResponse) -> AdapterPage:
    """Convert one page of the registry."""
    return AdapterPage(tuple(map(adapter_from, response.adapters)), response.next_page_token)


def health_from(response: Int32Value) -> Health:
    """Convert a health; UNKNOWN for a value of a newer standard."""
    members = list(Health)  # in the order of the standard's numbers
    return members[response.value] if 0 <= response.value < len(members) else Health.UNKNOWN


def _named(enum: type[_E], prefix: str, name_of: Callable[[Any], str], value: int) -> _E:
    """The member behind a contract's value such as FINISH_REASON_STOP; UNKNOWN for a newer server's."""
    try:
        return enum(name_of(value).removeprefix(prefix))
    except ValueError:
        return enum("UNKNOWN")
