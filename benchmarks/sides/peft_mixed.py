"""PEFT's own mixed batch on workload W: `generate(adapter_names=...)`; the prompts need no padding."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS, adapter_names, requests
from polygraft.base.loader import resolve_model


def main() -> None:
    store, quantization, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(2)
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
    base = AutoModelForCausalLM.from_pretrained(resolve_model("default"), **options)
    first, *others = adapter_names()
    model = PeftModel.from_pretrained(base, str(store / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(store / name), adapter_name=name)
    model.eval()
    ids = torch.tensor([prompt for prompt, _ in requests()])
    names = [name for _, name in requests()]

    def run(_: str) -> dict[str, Any]:
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=names,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
        seconds = time.perf_counter() - started
        generated = out.numel() - ids.numel()
        assert generated == len(names) * NEW_TOKENS
        return {"tokens_per_s": generated / seconds}

    answer_rounds(run)


if __name__ == "__main__":
    main()
