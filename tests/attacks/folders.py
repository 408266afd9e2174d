"""What an author of adapters can put into a folder."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from polygraft.base.default_model import ensure_default_model
from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from tests.attacks.target import Target, adapters, attack, chat, counted, inference, load, outcome

SAMPLE = Path(__file__).resolve().parents[2] / "adapters" / "ticket-lora"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def _copy(target: Target, name: str, config: dict[str, object] | None = None) -> Path:
    """A good adapter in the store, with another configuration."""
    folder = target.store / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(SAMPLE / WEIGHTS, folder)
    settings = json.loads((SAMPLE / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def _tokenizer() -> dict[str, object]:
    found: dict[str, object] = json.loads((ensure_default_model() / "tokenizer.json").read_text())
    return found


async def _with_tokenizer(target: Target, name: str, changes: dict[str, object]) -> str:
    folder = _copy(target, name)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer() | changes))
    return await load(target, name)


@attack
async def a_tokenizer_that_panics(target: Target) -> str:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}
    return await _with_tokenizer(target, "panic", {"normalizer": normalizer})


@attack
async def a_tokenizer_that_pads_to_2_to_the_36(target: Target) -> str:
    padding = {
        "strategy": {"Fixed": 2**36}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    return await _with_tokenizer(target, "padding", {"padding": padding})


@attack
async def a_tokenizer_of_deep_nesting(target: Target) -> str:
    normalizer: dict[str, object] = {"type": "Lowercase"}
    for _ in range(50_000):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    folder = _copy(target, "nested")
    text = '{"type": "Sequence", "normalizers": [' * 50_000 + '{"type": "Lowercase"}' + "]}" * 50_000
    whole = json.dumps(_tokenizer() | {"normalizer": "@"}).replace('"@"', text)
    (folder / "tokenizer.json").write_text(whole)
    return await load(target, "nested")


TEMPLATES = {
    "three nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "two nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "seven megabytes": "{{ 1 + 1 }}" * 650_000,
    "much memory": "{% set ns = namespace(x='x' * 1000) %}{% for a in range(40) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "division by zero": "{{ 1 // 0 }}",
    "no such index": "{{ messages[7].content }}",
    "a huge power": "{{ 10 ** 10 ** 9 }}",
}


@attack
async def templates_that_never_end(target: Target) -> str:
    found = []
    async with target.channel() as channel:
        for name, template in TEMPLATES.items():
            folder = _copy(target, "template")
            (folder / "chat_template.jinja").write_text(template)
            request = ap.LoadAdapterRequest(name="template")
            result = await outcome(adapters(channel).LoadAdapter(request, timeout=120))
            if result == "OK":
                generate = pb.GenerateRequest(adapter="template", chat=chat("hi"))
                calls = [inference(channel).Generate(generate, timeout=120) for _ in range(4)]
                result = "loaded; " + counted(await asyncio.gather(*map(outcome, calls)))
                unload = ap.UnloadAdapterRequest(name="template")
                result += "; unload " + await outcome(adapters(channel).UnloadAdapter(unload, timeout=20))
            found.append(f"{name}: {result}")
    return " | ".join(found)


CONFIGURATIONS: dict[str, dict[str, object]] = {
    "1,200 layers_pattern": {
        "layers_to_transform": list(range(100)),
        "layers_pattern": [f"l{at}" for at in range(1200)],
    },
    "12,000 modules_to_save": {"modules_to_save": [f"m{at}" for at in range(12_000)]},
    "12,000 rank_pattern": {"rank_pattern": {f"m{at}.*x": 3 for at in range(12_000)}},
    "12,000 alpha_pattern": {"alpha_pattern": {f"m{at}.*x": 3 for at in range(12_000)}},
    "12,000 target_modules": {"target_modules": ["q_proj", *(f"m{at}" for at in range(12_000))]},
    "12,000 exclude_modules": {"exclude_modules": [f"m{at}" for at in range(12_000)]},
    "12,000 target_parameters": {"target_parameters": [f"m{at}.weight" for at in range(12_000)]},
    "a pattern that backtracks": {"target_modules": "(a|a)*" * 20 + "b"},
    "20,000 parentheses": {"target_modules": "(" * 20_000 + ")" * 20_000},
    "12,000 invocation tokens": {"alora_invocation_tokens": list(range(12_000))},
}


@attack
async def configurations_that_take_long(target: Target) -> str:
    found = []
    for name, config in CONFIGURATIONS.items():
        _copy(target, "config", config)
        found.append(f"{name}: {(await load(target, 'config'))[:60]}")
    return " | ".join(found)


def add_broken_folder(store: Path) -> None:
    """A folder of 60,000 tensors that nobody expects, there at the start, so that it is listed as failed."""
    folder = store / "broken"
    folder.mkdir()
    shutil.copy(SAMPLE / CONFIG, folder)
    tensors = {f"line\nbreak {at}": torch.zeros(1) for at in range(60_000)}
    save_file(load_file(SAMPLE / WEIGHTS) | tensors, folder / WEIGHTS)


@attack
async def a_list_with_sixty_thousand_problems(target: Target) -> str:
    result = await load(target, "broken")
    async with target.channel() as channel:
        answer = await adapters(channel).ListAdapters(ap.ListAdaptersRequest(), timeout=30)
        assert answer.ByteSize() < 2**18, f"{answer.ByteSize()} bytes"
    return f"loaded again: {result}; listed in {answer.ByteSize()} bytes"


@attack
async def headers_that_lie(target: Target) -> str:
    found = []
    for name, shape in {"2 to the 63": [0, 2**63], "negative": [-1, 4], "huge": [2**40, 2**40]}.items():
        folder = _copy(target, "header")
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
        found.append(f"{name}: {(await load(target, 'header'))[:60]}")
    return " | ".join(found)


@attack
async def thirty_loads_of_75_mib_at_once(target: Target) -> str:
    rank = 128  # 78 MB in bfloat16
    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    }
    names = [f"big-{at}" for at in range(30)]
    torch.manual_seed(0)
    tensors = {}
    for layer in range(30):
        for module, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs).bfloat16() * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank).bfloat16() * 0.01
    config = {"r": rank, "lora_alpha": rank, "target_modules": [name.split(".")[1] for name in shapes]}
    first = _copy(target, names[0], config)
    save_file(tensors, first / WEIGHTS)
    for name in names[1:]:
        shutil.rmtree(target.store / name, ignore_errors=True)
        shutil.copytree(first, target.store / name)
    async with target.channel() as channel:
        calls = [adapters(channel).LoadAdapter(ap.LoadAdapterRequest(name=n), timeout=900) for n in names]
        result = counted(await asyncio.gather(*map(outcome, calls)))
        for name in names:
            await outcome(adapters(channel).UnloadAdapter(ap.UnloadAdapterRequest(name=name), timeout=60))
    for name in names:
        shutil.rmtree(target.store / name)
    return result


@attack
async def twenty_folders_with_the_base_s_tokenizer(target: Target) -> str:
    names = [f"own-{at}" for at in range(20)]
    text = json.dumps(_tokenizer())
    for name in names:
        (_copy(target, name) / "tokenizer.json").write_text(text)
    return counted([await load(target, name) for name in names])
