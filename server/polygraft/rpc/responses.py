"""From the domain to protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polygraft
from polygraft.core.output import RequestOutput
from polygraft.engine.client import ModelInfo
from polygraft_api.v1 import adapters_pb2 as apb
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_types.adapters import AdapterInfo, MergedInfo, NearestToken
from polygraft_types.answers import Finished, TokenLogprob

ID_BYTES = 3
"""Size of a token id in a message, roughly."""
ENTRY_BYTES = 24
"""Size of a token with its log-probability, or of one of the likeliest tokens, roughly."""


def _usage(finished: Finished) -> pb.Usage:
    usage = finished.usage
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        virtual_tokens=usage.virtual_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _timings(finished: Finished) -> pb.Timings:
    timings = finished.timings
    return pb.Timings(
        queue=timings.queue or 0.0,
        prefill=timings.prefill or 0.0,
        time_to_first_token=timings.time_to_first_token or 0.0,
        total=timings.total,
    )


def summary(finished: Finished, request_id: str) -> pb.GenerateSummary:
    """How a request ended."""
    return pb.GenerateSummary(
        finish_reason=pb.FinishReason.Value(f"FINISH_REASON_{finished.reason.value}"),
        usage=_usage(finished),
        timings=_timings(finished),
        adapter_generation=next(iter(finished.adapter_generations), 0),
        lora_path=pb.LoraPath.Value(f"LORA_PATH_{finished.path.value}"),
        seed=finished.seed,
        stop_sequence=finished.stop_sequence or "",
        stop_token_id=finished.stop_token_id,
        preemptions=finished.preemptions,
        request_id=request_id,
        adapter_generations=finished.adapter_generations,
    )


def logprobs(tokens: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    """Tokens with their log-probabilities."""
    return [
        pb.TokenLogprob(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            top=[
                pb.TopLogprob(token_id=near.token_id, text=near.text, logprob=near.logprob)
                for near in token.top
            ],
        )
        for token in tokens
    ]


def scores(output: RequestOutput, finished: Finished, request_id: str) -> pb.ScoreResponse:
    """How likely continuations are."""
    return pb.ScoreResponse(
        scores=[
            pb.ContinuationScore(
                log_likelihood=score.log_likelihood,
                is_greedy=score.is_greedy,
                tokens=logprobs(score.tokens),
            )
            for score in output.scores
        ],
        usage=_usage(finished),
        timings=_timings(finished),
        adapter_generation=next(iter(finished.adapter_generations), 0),
        lora_path=pb.LoraPath.Value(f"LORA_PATH_{finished.path.value}"),
        request_id=request_id,
        adapter_generations=finished.adapter_generations,
    )


def model(info: ModelInfo) -> pb.GetModelResponse:
    """What is being served."""
    default = info.default_sampling
    return pb.GetModelResponse(
        model=info.model,
        architecture=info.architecture,
        dtype=info.dtype,
        quantization=info.quantization,
        device=info.device,
        context_length=info.context_length,
        vocabulary_size=info.vocabulary_size,
        parameters=info.parameters,
        weight_bytes=info.weight_bytes,
        kv_cache_bytes=info.kv_cache_bytes,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        eos_token_ids=info.eos_token_ids,
        default_sampling=pb.SamplingOptions(
            temperature=default.temperature,
            top_p=default.top_p,
            top_k=default.top_k,
            min_p=default.min_p,
            repetition_penalty=default.repetition_penalty,
            presence_penalty=default.presence_penalty,
            frequency_penalty=default.frequency_penalty,
        ),
        has_chat_template=info.has_chat_template,
        server_version=polygraft.__version__,
        notes=info.notes,
        default_lora_path=pb.LoraPath.Value(f"LORA_PATH_{info.default_lora_path.value}"),
        merged_capacity_bytes=info.merged_capacity_bytes,
    )


def adapter(info: AdapterInfo) -> apb.Adapter:
    """One adapter."""
    message = apb.Adapter(
        name=info.name,
        generation=info.generation,
        state=apb.AdapterState.Value(f"ADAPTER_STATE_{info.state.value}"),
        kind=info.kind,
        primitives=info.primitives,
        modules=info.modules,
        rank=info.rank,
        virtual_tokens=info.virtual_tokens,
        parameters=info.parameters,
        disk_bytes=info.disk_bytes,
        compiled_bytes=info.compiled_bytes,
        source=info.source,
        content_hash=info.content_hash,
        running_requests=info.running_requests,
        load_seconds=info.load_seconds,
        problems=info.problems,
        warnings=info.warnings,
        mergeable=info.mergeable,
        own_prompts=info.own_prompts,
        merged_only=info.merged_only,
        merged=None if info.merged is None else merged_copy(info.merged),
    )
    if info.load_time > 0:
        message.load_time.FromMicroseconds(round(info.load_time * 1e6))
    return message


def merged_copy(info: MergedInfo) -> apb.MergedCopy:
    """An adapter's merged copy."""
    measured = info.deviation
    return apb.MergedCopy(
        state=apb.MergeState.Value(f"MERGE_STATE_{info.state.value}"),
        pinned=info.pinned,
        memory_bytes=info.bytes,
        dtype=info.dtype,
        merge_seconds=info.seconds,
        problem=info.problem,
        deviation=None
        if measured is None
        else apb.Deviation(
            largest=measured.largest,
            mean=measured.mean,
            greedy_agreement=measured.greedy_agreement,
            positions=measured.positions,
        ),
    )


def nearest(tokens: Sequence[NearestToken]) -> apb.NearestTokens:
    """The vocabulary's nearest tokens to one virtual token."""
    return apb.NearestTokens(
        tokens=[
            apb.NearestToken(token_id=near.token_id, text=near.text, similarity=near.similarity)
            for near in tokens
        ]
    )
