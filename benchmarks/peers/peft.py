"""PEFT on transformers' `generate`, in a mixed batch or one adapter at a time; prompts need no padding."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.cases import CASES, IN_FLIGHT, Ask, answer, by_adapter
from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS, adapter_names
from polygraft.base.model_folder import resolve_model

THREADS = 2
BASE = "__base__"
"""PEFT's name for no adapter in a mixed batch."""


def load_base(quantization: str, dtype: str) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantization == "int8":
        # MatMul8bitLt logs a line at every call.
        warnings.filterwarnings("ignore", module="bitsandbytes")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        options["device_map"] = "cpu"
    elif quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        options["device_map"] = "cpu"
    return AutoModelForCausalLM.from_pretrained(resolve_model("default"), **options)


class Peft:
    """A base with adapters, which are loaded when a case first asks for them.

    Args:
        mixing: whether requests of several adapters share a batch.
    """

    def __init__(self, store: Path, quantization: str, dtype: str, mixing: bool) -> None:
        self._store = store
        self._mixing = mixing
        first, *others = adapter_names()
        base = load_base(quantization, dtype)
        self._model = PeftModel.from_pretrained(base, str(store / first), adapter_name=first)
        self._load(others)

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._model.peft_config:
                self._model.load_adapter(str(self._store / name), adapter_name=name)
        self._model.eval()

    def run(self, case: str) -> dict[str, Any]:
        """Answer all requests of a case."""
        asks = CASES[case]
        self._load([ask.adapter for ask in asks if ask.adapter])
        started = time.perf_counter()
        with torch.inference_mode():
            outputs = self._mixed(asks) if self._mixing else self._one_at_a_time(asks)
        return answer(outputs, time.perf_counter() - started)

    def _mixed(self, asks: Sequence[Ask]) -> list[list[int]]:
        outputs: list[list[int]] = []
        for start in range(0, len(asks), IN_FLIGHT):
            batch = asks[start : start + IN_FLIGHT]
            outputs += self._generate(batch, adapter_names=[ask.adapter or BASE for ask in batch])
        return outputs

    def _one_at_a_time(self, asks: Sequence[Ask]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in asks]
        for positions in by_adapter(asks):
            batch = [asks[n] for n in positions]
            if batch[0].adapter is None:
                with self._model.disable_adapter():
                    answers = self._generate(batch)
            else:
                self._model.set_adapter(batch[0].adapter)
                answers = self._generate(batch)
            for n, tokens in zip(positions, answers, strict=True):
                outputs[n] = tokens
        return outputs

    def _generate(self, asks: Sequence[Ask], **options: Any) -> list[list[int]]:
        ids = torch.tensor([ask.prompt for ask in asks])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
            **options,
        )
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers


def main() -> None:
    store, quantization, dtype, how = sys.argv[1:]
    torch.set_num_threads(THREADS)
    answer_rounds(Peft(Path(store), quantization, dtype, how == "mixed").run)


if __name__ == "__main__":
    main()
