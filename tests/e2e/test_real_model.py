"""The default model with the sample adapters, as a user runs them, against the libraries themselves."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from polygraft.base.default_model import ensure_default_model
from polygraft.cli.demo.launcher import Addresses
from polygraft_client import AsyncClient, Generation, LoraPath
from tests.e2e.conftest import SAMPLES

pytestmark = pytest.mark.real
ROOT = SAMPLES.parent
NEW_TOKENS = 24


def questions() -> list[tuple[str, str]]:
    """(adapter, prompt) of the demo; "" is the base."""
    demo = json.loads((SAMPLES / "demo.json").read_text())
    return [("", "What is the capital of France?"), *((d["adapter"], d["prompt"]) for d in demo)]


async def ask(
    client: AsyncClient, adapter: str, prompt: str, lora_path: LoraPath = LoraPath.UNMERGED
) -> Generation:
    return await client.generate(
        chat=[{"role": "user", "content": prompt}],
        adapter=adapter or None,
        lora_path=lora_path,
        temperature=0.0,
        max_new_tokens=NEW_TOKENS,
        return_token_ids=True,
    )


def library_answer(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    # With a prefix or a soft prompt, PEFT gives back the prompt or not, by version; the answer is the end.
    new = out[0].tolist()
    return new[ids.shape[1] :] if new[: ids.shape[1]] == ids[0].tolist() else new


@pytest.fixture(scope="module")
def mixed(real_server: Addresses) -> dict[str, Generation]:
    """Everybody's answers to one burst."""

    async def burst() -> list[Generation]:
        async with AsyncClient(real_server.grpc) as client:
            return await asyncio.gather(*(ask(client, *question) for question in questions()))

    answers = asyncio.run(burst())
    return {adapter: answer for (adapter, _), answer in zip(questions(), answers, strict=True)}


def test_base_answers_as_one_knows_it(mixed: dict[str, Generation]) -> None:
    assert mixed[""].text == "The capital of France is Paris."


def with_adapter(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with a sample in it, by PEFT, or by the code that trains the samples in AdapterHub's form."""
    if (folder / "adapter_model.safetensors").exists():
        return PeftModel.from_pretrained(model, str(folder))
    monkeypatch.syspath_prepend(str(SAMPLES))
    bottleneck = importlib.import_module("bottleneck")
    return bottleneck.load(model, folder)


@pytest.mark.parametrize("adapter", dict(questions()))
def test_every_answer_of_the_burst_is_the_librarys_own(
    mixed: dict[str, Generation], adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = with_adapter(model, SAMPLES / adapter, monkeypatch)
    prompt = dict(questions())[adapter]
    expected = library_answer(model.eval(), AutoTokenizer.from_pretrained(folder), prompt)
    assert list(mixed[adapter].token_ids) == expected


def test_merged_answers_are_the_unmerged_ones(real_server: Addresses, mixed: dict[str, Generation]) -> None:
    async def burst() -> list[tuple[str, Generation, Generation]]:
        async with AsyncClient(real_server.grpc) as client:
            able = {adapter.name async for adapter in client.adapters.list() if adapter.mergeable}
            asked = [(adapter, prompt) for adapter, prompt in questions() if adapter in able]
            both = [(*question, path) for question in asked for path in (LoraPath.MERGED, LoraPath.UNMERGED)]
            answers = await asyncio.gather(*(ask(client, *each) for each in both))
            return [(asked[at][0], answers[2 * at], answers[2 * at + 1]) for at in range(len(asked))]

    answers = asyncio.run(burst())
    assert {adapter for adapter, _, _ in answers} >= {"headline", "json-contact", "pirate"}
    for adapter, merged, unmerged in answers:
        assert (merged.lora_path, unmerged.lora_path) == (LoraPath.MERGED, LoraPath.UNMERGED)
        assert merged.token_ids == unmerged.token_ids == mixed[adapter].token_ids


def test_demo_shows_everything_and_leaves_nothing_running() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polygraft", "demo"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for adapter, _ in questions()[1:]:
        assert adapter in done.stdout
    assert "tokens per second" in done.stdout or "tokens/s" in done.stdout
    assert not processes_of(ROOT)


def processes_of(root: Path) -> list[str]:
    """Command lines of servers that the demo may have left."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "polygraft serve" in command and "kv-cache-bytes 128MiB" in command:
            found.append(command)
    return found
