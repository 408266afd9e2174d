"""Makes llama.cpp's files: the default model's GGUF in other precisions, and PEFT's LoRA folders as GGUF."""

from __future__ import annotations

import json
import shutil
import sys
from ctypes import byref
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

from benchmarks.workload import adapter_names

PRECISIONS = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
ORIGINAL = "Q4_1"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in GGUF's order: rotary pairs side by side, not half a head apart."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def convert_adapter(folder: Path, model_config: dict[str, int], into: Path) -> None:
    """Write one PEFT LoRA folder as a GGUF adapter."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model_config["num_hidden_layers"])
    heads = {"q_proj": model_config["num_attention_heads"], "k_proj": model_config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(into, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, factor, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        projection = module.rsplit(".", 1)[-1]
        if factor == "lora_B" and projection in heads:
            tensor = permuted(tensor, heads[projection])
        name = names.get_name(module)
        assert name, module
        writer.add_tensor(f"{name}.weight.{factor.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    source, model, store, into = map(Path, sys.argv[1:])
    into.mkdir()
    shutil.copy(source, into / f"{ORIGINAL}.gguf")
    for name, kind in PRECISIONS.items():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = kind
        options.allow_requantize = True
        target = into / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(bytes(source), bytes(target), byref(options)):
            raise RuntimeError(f"llama.cpp can't requantize to {name}")
    model_config = json.loads((model / "config.json").read_text())
    for name in adapter_names():
        convert_adapter(store / name, model_config, into / f"{name}.gguf")


if __name__ == "__main__":
    main()
