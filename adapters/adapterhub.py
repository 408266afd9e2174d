"""AdapterHub's library `adapters` on the default model.

As a script, it checks the bottleneck adapters against the library.

The library pins an older transformers than the server needs, so it has an environment of its own:

    python -m venv build/adapterhub
    build/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0 platformdirs rich
    PYTHONPATH=server build/adapterhub/bin/python adapters/adapterhub.py
    PYTHONPATH=server build/adapterhub/bin/python adapters/evaluate.py --library adapterhub

The check: the library's loader finds every tensor that it looks for and no other, and its logits are those of
the code that trained the adapter (`bottleneck.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from base_model import chat_ids
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import adapters
from adapters import AdapterSetup
from polygraft.base.default_model import ensure_default_model

TOLERANCE = 1e-4  # between two float32 computations of one formula


def load_base() -> tuple[Any, Any]:
    """The default model in float32, without adapters, and its tokenizer."""
    folder = ensure_default_model()
    config = AutoConfig.from_pretrained(folder)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers 4 looks for it
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """The default model with a saved adapter active.

    Raises:
        RuntimeError: the library misses a tensor, or doesn't know one.
    """
    model, tokenizer = load_base()
    adapters.init(model)
    found: dict[str, list[str]] = {}
    name = model.load_adapter(str(folder), use_safetensors=True, loading_info=found)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise RuntimeError(f"{folder.name}: {found}")
    model.set_active_adapters(name)
    # Its Llama layers expect the cache as `past_key_value`; the transformers that it pins (4.57.6) hands them
    # `past_key_values`. So nothing is ever cached, and with a cache every new token sees itself alone.
    model.generation_config.use_cache = False
    return model.eval(), tokenizer


def switched_off() -> AbstractContextManager[object]:
    """No adapter acts inside it."""
    setup: AbstractContextManager[object] = AdapterSetup(None)
    return setup


def main() -> None:
    """Compare logits on the held-out messages of every bottleneck adapter."""
    import bottleneck
    import recipe

    for name in recipe.names():
        made = recipe.load(name)
        if not made.bottleneck:
            continue
        folder = recipe.ADAPTERS / name
        (library, tokenizer), ours = load(folder), bottleneck.load(load_base()[0], folder)
        worst, change = 0.0, 0.0
        for prompt, _ in made.held_out[::8]:
            ids = torch.tensor([chat_ids(tokenizer, prompt)])
            with torch.inference_mode():
                theirs = library(input_ids=ids).logits
                worst = max(worst, (theirs - ours(input_ids=ids).logits).abs().max().item())
                with ours.disable_adapter():
                    change = max(change, (theirs - ours(input_ids=ids).logits).abs().max().item())
        print(f"{name}: within {worst:.1e} of the library's logits, which it changes by up to {change:.1f}")
        assert worst < TOLERANCE < change


if __name__ == "__main__":
    main()
