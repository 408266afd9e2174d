"""Train the sample adapters again: all of them, or those named.

    python adapters/train.py [NAME ...]

Writes `adapter_config.json`, the weights (`adapter_model.safetensors`, of a bottleneck adapter
`adapter.safetensors`) and `eval.jsonl` into each `adapters/<name>/`.
The seeds are fixed; another machine or another number of threads may still differ in the last digits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import recipe
import torch
from base_model import chat_ids, load_base
from bottleneck import CONFIG_FILE, WEIGHTS_FILE, BottleneckModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, initialize_kv_prefix_from_text
from recipe import ADAPTERS, BASE_MODEL, Recipe
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polygraft.base.default_model import ensure_default_model

SEED = 20
CONFIGS = {
    "LORA": peft.LoraConfig,
    "ADALORA": peft.AdaLoraConfig,
    "IA3": peft.IA3Config,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
}
FIT_STEPS = 1000
IGNORED = -100  # the label that torch's cross entropy leaves out


def with_adapter(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, made: Recipe
) -> PeftModel | BottleneckModel:
    """Wrap the base with a fresh adapter of the recipe's kind."""
    if made.bottleneck:
        return BottleneckModel(base, made.name, **made.bottleneck)
    arguments = dict(made.peft)
    if arguments["peft_type"] == "ADALORA":
        arguments["total_step"] = made.training.steps
    if "prompt_tuning_init_text" in arguments:
        arguments["tokenizer_name_or_path"] = str(ensure_default_model())
    config = CONFIGS[arguments.pop("peft_type")](task_type="CAUSAL_LM", **arguments)
    model = get_peft_model(base, config)
    if made.init_text and made.peft["peft_type"] == "P_TUNING":
        fit_prompt_encoder(model, tokenizer, made.init_text)
    elif made.init_text:
        initialize_kv_prefix_from_text(model, tokenizer, text=made.init_text, use_chat_template=False)
    return model


def fit_prompt_encoder(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Make P-tuning's encoder give the embeddings of a text, from which it learns several times faster."""
    encoder, slots = model.prompt_encoder["default"], model.prompt_tokens["default"]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: len(slots)])
    wanted = model.get_base_model().get_input_embeddings()(ids).detach()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(encoder(slots), wanted)
        loss.backward()
        optimizer.step()
    left = (loss / wanted.square().mean()).item()
    print(f"prompt encoder: {left:.1e} of the square of the text's embeddings is left", flush=True)


def batches(
    made: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Endless right-padded batches and their labels, which count the answer and its end token only.

    Examples of about the same length share a batch: on a CPU, padding costs as much as text.
    """
    order = random.Random(SEED)
    rows = []
    for prompt, answer in made.train:
        head = chat_ids(tokenizer, prompt)
        tail = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((head, tail))
    size = made.training.batch_size
    while True:
        order.shuffle(rows)
        window = sorted(rows[: 16 * size], key=lambda row: len(row[0]) + len(row[1]))
        groups = [window[start : start + size] for start in range(0, len(window), size)]
        order.shuffle(groups)
        for group in groups:
            width = max(len(head) + len(tail) for head, tail in group)
            pads = [width - len(head) - len(tail) for head, tail in group]
            pad_id = tokenizer.pad_token_id
            ids = [head + tail + [pad_id] * pad for (head, tail), pad in zip(group, pads, strict=True)]
            mask = [[1] * (width - pad) + [0] * pad for pad in pads]
            labels = [
                [IGNORED] * len(head) + tail + [IGNORED] * pad
                for (head, tail), pad in zip(group, pads, strict=True)
            ]
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            yield inputs, torch.tensor(labels)


def off_orthogonal(model: PeftModel) -> torch.Tensor:
    """AdaLoRA's regulariser, which PEFT's forward adds to a loss that it computes itself (`AdaLoraModel`)."""
    factors = [
        weight if "lora_A" in name else weight.T
        for name, weight in model.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    off = [torch.linalg.norm(rows @ rows.T - torch.eye(len(rows))) for rows in factors]
    return model.peft_config["default"].orth_reg_weight * torch.stack(off).mean()


def train(model: PeftModel | BottleneckModel, tokenizer: PreTrainedTokenizerBase, made: Recipe) -> None:
    """Train the adapter in place."""
    plan = made.training
    adalora = made.peft.get("peft_type") == "ADALORA"
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, weight_decay=0.0)
    warm = max(1, plan.steps // 10)
    model.train()
    started, recent, since = time.monotonic(), 0.0, 0
    for step, (inputs, labels) in zip(range(1, plan.steps + 1), batches(made, tokenizer), strict=False):
        # Logits only where an answer is predicted: the vocabulary's projection is a quarter of the work.
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        keep = labels.shape[1] - first + 1
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORED
        )
        (loss + off_orthogonal(model) if adalora else loss).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        optimizer.param_groups[0]["lr"] = plan.learning_rate * min(step / warm, decay)
        optimizer.step()
        if adalora:  # moves ranks to where they matter, by the gradients
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        recent += loss.item()
        if step % 10 == 0 or step == plan.steps:
            seconds = time.monotonic() - started
            loss_now = recent / (step - since)
            print(f"{made.name}: step {step}/{plan.steps}, loss {loss_now:.4f}, {seconds:.0f} s", flush=True)
            recent, since = 0.0, step
    model.eval()


def save(model: PeftModel | BottleneckModel, folder: Path) -> None:
    """Write the library's two files: weights in float16, a config with the hub's name of the base."""
    bottleneck = isinstance(model, BottleneckModel)
    tensors = model.tensors() if bottleneck else get_peft_model_state_dict(model)
    half = {key: tensor.detach().to(torch.float16).contiguous() for key, tensor in sorted(tensors.items())}
    config = model.config() if bottleneck else peft_config(model)
    with tempfile.TemporaryDirectory(prefix=".save-", dir=ADAPTERS.parent) as temp:
        weights_file = WEIGHTS_FILE if bottleneck else "adapter_model.safetensors"
        save_file(half, Path(temp, weights_file), metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        Path(temp, CONFIG_FILE).write_text(text, encoding="utf-8")
        for path in sorted(Path(temp).iterdir()):
            path.chmod(0o644)  # safetensors writes 0600
            path.replace(folder / path.name)


def peft_config(model: PeftModel) -> dict[str, Any]:
    """What PEFT would write, but for the base's name."""
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": BASE_MODEL, "inference_mode": True}
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    config.pop("revision", None)  # of the base: any revision of it will do
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = BASE_MODEL
    return config


def make(name: str) -> None:
    """Train one adapter and write its folder."""
    made = recipe.load(name)
    lines = [json.dumps({"prompt": p, "expected": e}, ensure_ascii=False) for p, e in made.held_out]
    (ADAPTERS / name / "eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    torch.manual_seed(SEED)
    base, tokenizer = load_base(made.quantization)
    model = with_adapter(base, tokenizer, made)
    train(model, tokenizer, made)
    save(model, ADAPTERS / name)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="adapters to train (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or recipe.names():
        make(name)


if __name__ == "__main__":
    main()
