"""Diagnoses folders that can't be served.

A folder for another base has a problem with each of its tensors. A diagnosis is the one sentence that
explains them all, and is shown first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from polygraft.core.spec import BaseSpec

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = "base_model.model."
_LAYER = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d{1,5})\.")
_PART = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b.*")
_PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
"""Kinds whose prompt_embeddings have the base's hidden size."""


def diagnose_file(file: str, content: bytes) -> str | None:
    """Recognise a file that isn't what its name says: a Git LFS pointer, a web page, a pickle, an empty file.

    Args:
        content: all of it, or its first hundred bytes.

    Returns:
        a sentence; None if the file is none of these.
    """
    start = content[:100].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{file} is a Git LFS pointer, not the file: run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            f"{file} is a web page, not the file: the download got an error or a login page; fetch it again"
        )
    # A safetensors file begins with the length of its header, so with any bytes, and goes on with a brace.
    if content.startswith(_PICKLE) and content[8:9] != b"{":
        return (
            f"{file} is a pickle under another name: name it adapter_model.bin, then convert the folder with "
            "`polygraft adapters convert FOLDER OUT`"
        )
    if not content:
        return f"{file} is empty: the upload or download was interrupted; copy it again"
    return None


def diagnose_tensors(shapes: Shapes, config: Mapping[str, Any], base: BaseSpec) -> str | None:
    """Find out why a folder's tensors don't fit a base.

    Args:
        shapes: of all tensors in the file, by name.

    Returns:
        a sentence; None if no cause is recognised.
    """
    names = list(shapes)
    if sum(0 in shape for shape in shapes.values()) > len(shapes) // 2:
        return (
            "its tensors are empty, as DeepSpeed ZeRO-3 saves them unless they are gathered first: gather "
            "them, and save the adapter again"
        )
    return _other_saver(names) or _other_size(shapes, config, base) or _other_architecture(names, base)


def _other_saver(names: list[str]) -> str | None:
    """Recognise who saved the file, by how its keys differ from those of PEFT's `save_pretrained`."""
    if any(re.search(r"\.lora_\w+\.default\b|\.default\.weight$", name) for name in names):
        return (
            "saved by an older trainer, or from the model's state dict: keys carry `.default`. Save it with "
            "PEFT's save_pretrained, or remove `.default` from the keys"
        )
    for wrapper, who in (("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")):
        if any(name.startswith(wrapper) or f".{wrapper}" in name for name in names):
            return (
                f"saved from a model wrapped by {who}: keys carry `{wrapper}`. Save the unwrapped model, or "
                f"remove `{wrapper}` from the keys"
            )
    if any(name.startswith(("lora_unet_", "lora_te_", "unet.", "text_encoder.")) for name in names):
        return "made for an image model: its keys are those of diffusers or kohya"
    if not any(name.startswith(("base_model.", "prompt_embeddings")) for name in names):
        if any("lora_" in name for name in names):
            return (
                f"saved by another library than PEFT: keys lack `{_PREFIX}`. Save it with PEFT's "
                f"save_pretrained, or put `{_PREFIX}` before each key"
            )
        if any(name.endswith(("_proj.weight", "embed_tokens.weight", "wte.weight")) for name in names):
            return (
                "its file holds a full model's weights, not an adapter's: serve it as the base with --model, "
                "or save the adapter alone with PEFT's save_pretrained"
            )
    return None


def _other_size(shapes: Shapes, config: Mapping[str, Any], base: BaseSpec) -> str | None:
    """Recognise a base of another hidden size, or with more layers."""
    found = _hidden_sizes(shapes, config.get("peft_type"), base)
    if found and base.hidden_size not in found:
        ((size, _),) = found.most_common(1)
        return f"made for hidden size {size}; the base has {base.hidden_size}{_named(config)}"
    layers = _layers(shapes)
    own = _layers(base.linears) or _layers(base.others)
    if layers > own > 0:
        return f"made for a base of at least {layers} layers; this one has {own}{_named(config)}"
    return None


def _hidden_sizes(shapes: Shapes, kind: object, base: BaseSpec) -> Counter[int]:
    """Count the hidden sizes that the tensors' shapes imply."""
    found: Counter[int] = Counter()
    for name, shape in shapes.items():
        if name == "prompt_embeddings" and len(shape) == 2 and kind in _SOFT_PROMPTS:
            found[shape[1]] += 1
        part = _PART.search(name)
        linear = base.linears.get(name[: part.start()].removeprefix(_PREFIX)) if part else None
        if part is None or linear is None or len(shape) != 2:
            continue
        if part[1] == "lora_A" and linear.in_features == base.hidden_size:
            found[shape[1]] += 1
        elif part[1] == "lora_B" and linear.out_features == base.hidden_size:
            found[shape[0]] += 1
    return found


def _layers(names: Iterable[str]) -> int:
    """Return the number of layers that the names imply, 0 if they number none."""
    numbers = (int(found[1]) for name in names if (found := _LAYER.search(f".{name}")))
    return 1 + max(numbers, default=-1)


def _other_architecture(names: list[str], base: BaseSpec) -> str | None:
    """Recognise a base that has none of the adapted modules."""
    modules = [name[: part.start()] for name in names if (part := _PART.search(name))]
    known = {*base.linears, *base.others}
    if not modules or any(module.removeprefix(_PREFIX) in known for module in modules):
        return None
    example = modules[0].removeprefix(_PREFIX)
    return (
        f"made for another architecture: none of its modules, such as {example}, is in this base "
        f"({base.architecture})"
    )


def _named(config: Mapping[str, Any]) -> str:
    trained_on = config.get("base_model_name_or_path")
    return f". It names the base {trained_on!r}" if isinstance(trained_on, str) and trained_on else ""
