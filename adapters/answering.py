"""Ways of answering a prompt with an adapter and without: PEFT, AdapterHub's library, a running server.

The libraries are imported where they are used, since no environment holds both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipe import ADAPTERS

if TYPE_CHECKING:
    from polygraft_client import Client

Answer = Callable[[str, int], str]
"""From a prompt and the largest number of new tokens to the answer's text."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The same model without the adapter and with it."""

    base: Answer
    adapter: Answer


def with_peft(name: str, quantization: str) -> Sides:
    """PEFT's own generate, in float32; the base is the same model with the adapter switched off."""
    from base_model import load_base
    from peft import PeftModel

    base, tokenizer = load_base(quantization)
    model = PeftModel.from_pretrained(base, ADAPTERS / name).eval()
    return Sides(_generate(model, tokenizer, model.disable_adapter), _generate(model, tokenizer, nullcontext))


def with_adapterhub(name: str, quantization: str) -> Sides:
    """The same with AdapterHub's library, which pins an older transformers: see `adapterhub.py`."""
    import adapterhub

    assert quantization == "none", "the library is measured on the unquantized base only"
    model, tokenizer = adapterhub.load(ADAPTERS / name)
    return Sides(
        _generate(model, tokenizer, adapterhub.switched_off), _generate(model, tokenizer, nullcontext)
    )


def with_server(client: Client, name: str) -> Sides:
    """A running server that has the adapter loaded, in whatever precision it serves."""

    def answer(adapter: str | None) -> Answer:
        def generate(prompt: str, limit: int) -> str:
            chat = [{"role": "user", "content": prompt}]
            return client.generate(chat=chat, adapter=adapter, max_new_tokens=limit, temperature=0.0).text

        return generate

    return Sides(answer(None), answer(name))


def _generate(model: Any, tokenizer: Any, context: Callable[[], AbstractContextManager[object]]) -> Answer:
    """Greedy, one unpadded request."""
    import torch
    from base_model import chat_ids

    def generate(prompt: str, limit: int) -> str:
        ids = torch.tensor([chat_ids(tokenizer, prompt)])
        with torch.inference_mode(), context():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return generate
