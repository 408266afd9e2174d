"""An adapter with tokens that the base doesn't know, loaded while others answer, through a real channel."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from tests.e2e.conftest import Live
from tests.e2e.test_bad_input import Code, refused
from tests.equivalence.reference import generate
from tests.peft_folders import CAUSAL, TARGETS
from tests.tiny import VOCABULARY, byte_tokenizer

ADDED = [f"<tool-{at}>" for at in range(36)]
TEMPLATE = "{% for m in messages %}<tool-3>{{ m.content }}{% endfor %}<tool-35>"


def resized(base: Path, tokens: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def save_tool_user(base: Path, folder: Path) -> int:
    """A LoRA that was trained with more tokens, as trainers save it; how many it knows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.chat_template = TEMPLATE
    config = LoraConfig(
        r=4, target_modules=TARGETS["llama"], modules_to_save=["embed_tokens", "lm_head"], **CAUSAL
    )
    model = get_peft_model(resized(base, len(tokenizer)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


async def test_an_adapter_speaks_its_own_tokens(live: Live, llama: Path) -> None:
    tokens = save_tool_user(llama, live.store / "tools")
    assert tokens > VOCABULARY
    last = tokens - 1
    before = await live.neighbour()
    neighbours = [asyncio.ensure_future(live.neighbour(name)) for name in ("", "lora-tokens", "")]
    loaded = await live.adapters.LoadAdapter(ap.LoadAdapterRequest(name="tools", source="tools"))
    assert loaded.adapter.own_prompts
    assert "replace" in loaded.adapter.primitives

    model = await live.inference.GetModel(pb.GetModelRequest(adapter="tools"))
    assert (model.vocabulary_size, model.has_chat_template) == (tokens, True)
    assert (await live.inference.GetModel(pb.GetModelRequest())).vocabulary_size == VOCABULARY

    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi <tool-0>")])
    asked = await live.inference.Tokenize(pb.TokenizeRequest(chat=chat, adapter="tools"))
    ids = list(asked.token_ids)
    assert ids[0] == tokens - 33
    assert ids[-1] == last
    text = await live.inference.Detokenize(pb.DetokenizeRequest(token_ids=ids[1:4], adapter="tools"))
    assert text.text == "hi "

    answer = await live.inference.Generate(
        pb.GenerateRequest(
            chat=chat,
            adapter="tools",
            stopping={"max_new_tokens": 8, "ignore_eos": True},
            response={"token_ids": True, "top_logprobs": 3},
        )
    )
    reference = PeftModel.from_pretrained(resized(llama, tokens), str(live.store / "tools")).eval()
    expected = generate(reference, ids, 8)
    assert list(answer.token_ids) == expected.tokens
    likeliest = expected.logits.log_softmax(-1).amax(-1)
    assert abs(torch.tensor([one.logprob for one in answer.logprobs]) - likeliest).max() < 2e-4

    spoken = await live.inference.Generate(
        pb.GenerateRequest(
            prompt="call",
            adapter="tools",
            sampling={"logit_bias": {last: 100.0}},
            stopping={"max_new_tokens": 3, "ignore_eos": True, "stop_token_ids": [last]},
            response={"token_ids": True},
        )
    )
    assert list(spoken.token_ids) == [last]
    score = await live.inference.Score(
        pb.ScoreRequest(prompt="call", continuations=[" <tool-35>"], adapter="tools")
    )
    assert [token.token_id for token in score.scores[0].tokens][-1] == last

    assert [await one for one in neighbours] == [before, await live.neighbour("lora-tokens"), before]


async def test_nobody_else_knows_them(live: Live, llama: Path) -> None:
    last = save_tool_user(llama, live.store / "tools") - 1
    await live.adapters.LoadAdapter(ap.LoadAdapterRequest(name="tools", source="tools"))
    for adapter in ("", "lora"):
        for fields, field in (
            ({"token_ids": {"ids": [1, last]}}, "token_ids.ids[1]"),
            ({"prompt": "x", "sampling": {"logit_bias": {last: 1.0}}}, f"sampling.logit_bias[{last}]"),
            ({"prompt": "x", "stopping": {"stop_token_ids": [last]}}, "stopping.stop_token_ids[0]"),
        ):
            call = live.inference.Generate(pb.GenerateRequest(adapter=adapter, **fields))
            code, text, fields_named, _ = await refused(call)
            assert (code, fields_named) == (Code.INVALID_ARGUMENT, [field])
            assert f"[0, {VOCABULARY})" in text
    merged = pb.GenerateRequest(prompt="x", adapter="tools", lora_path=pb.LORA_PATH_MERGED)
    code, text, _, reason = await refused(live.inference.Generate(merged))
    assert (code, reason) == (Code.FAILED_PRECONDITION, "ADAPTER_UNAVAILABLE")
    assert "lora has tokens of its own, which doesn't fold into the base's weights" in text


async def test_tokens_without_rows_are_refused_one_by_one(live: Live, llama: Path) -> None:
    last = save_tool_user(llama, live.store / "tools") - 1
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (live.store / "lora" / file).write_bytes((live.store / "tools" / file).read_bytes())
    loaded = await live.adapters.LoadAdapter(ap.LoadAdapterRequest(name="rowless", source="lora"))
    [warning] = loaded.adapter.warnings
    assert f"has ids up to {last}, and there are embeddings for {VOCABULARY} tokens" in warning
    await live.inference.Generate(pb.GenerateRequest(prompt="x", adapter="rowless"))
    call = live.inference.Generate(pb.GenerateRequest(prompt="x<tool-35>", adapter="rowless"))
    code, text, fields, _ = await refused(call)
    assert (code, fields) == (Code.INVALID_ARGUMENT, ["prompt"])
    assert f"'<tool-35>' of id {last}" in text
