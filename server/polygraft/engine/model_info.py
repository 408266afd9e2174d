"""What a served model tells of itself."""

from __future__ import annotations

from polygraft.base.loader import Base
from polygraft.config import ServerConfig
from polygraft.engine.client import ModelInfo
from polygraft.engine.prompts.prompts import Prompts
from polygraft_types.requests import LoraPath, SamplingParams


def model_info(
    base: Base,
    config: ServerConfig,
    *,
    kv_cache_bytes: int,
    merged_capacity_bytes: int,
    prompts: Prompts,
) -> ModelInfo:
    """The base as it is served under these settings.

    Args:
        prompts: the base's own.
    """
    return ModelInfo(
        model=config.served_model_name or base.name,
        architecture=base.spec.architecture,
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=base.quantization,
        device=str(base.device),
        context_length=base.context_length,
        vocabulary_size=base.spec.vocabulary_size,
        parameters=base.spec.parameters,
        weight_bytes=base.weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=prompts.eos_token_ids,
        default_sampling=default_sampling(base),
        has_chat_template=prompts.has_chat_template,
        default_lora_path=LoraPath[config.lora_path.upper()],
        merged_capacity_bytes=merged_capacity_bytes,
        notes=base.notes,
    )


def default_sampling(base: Base) -> SamplingParams:
    """What unset sampling fields mean: the model's generation_config, then greedy."""
    given = base.model.generation_config
    if given is None:
        return SamplingParams()

    def value(name: str, neutral: float) -> float:
        found = getattr(given, name, None)
        return neutral if found is None else found

    # transformers applies this one with or without sampling.
    repetition_penalty = float(value("repetition_penalty", 1.0))
    if not given.do_sample:
        return SamplingParams(repetition_penalty=repetition_penalty)
    return SamplingParams(
        temperature=float(value("temperature", 1.0)),
        top_p=float(value("top_p", 1.0)),
        top_k=int(value("top_k", 0)),
        min_p=float(value("min_p", 0.0)),
        repetition_penalty=repetition_penalty,
    )
