"""Finds how long a base model's sequences may be."""

from __future__ import annotations

from typing import Any


def context_limit(config: Any) -> tuple[int, tuple[str, ...]]:
    """Return how many positions are exact, and a note if that is less than the model's own limit.

    Transformers' `longrope` and `dynamic` RoPE depend on the longest position of the whole call, so in a
    packed step a long request would change a short one. Up to the original length they don't.
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
