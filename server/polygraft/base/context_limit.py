"""How long a sequence of a base model may be."""

from __future__ import annotations

from typing import Any


def context_limit(config: Any) -> tuple[int, tuple[str, ...]]:
    """Most positions that are exact, and why if that is less than the model's own.

    `longrope` and `dynamic` RoPE in transformers look at the longest position of the whole call, so in a
    packed step a long neighbour would change a short request. Up to the original length both are plain.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", 0) or 2048)
    rope = getattr(text, "rope_parameters", None) or {}
    per_type = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for parameters in per_type:
        if parameters.get("rope_type") in {"longrope", "dynamic"}:
            original = (
                parameters.get("original_max_position_embeddings")
                or getattr(text, "original_max_position_embeddings", None)
                or limit
            )
            if original < limit:
                note = (
                    f"context capped at {original} of {limit} tokens: {parameters['rope_type']} RoPE is "
                    "exact in a mixed step only up to its original length"
                )
                return int(original), (note,)
    return limit, ()
