"""Compiles an AdapterHub folder: the methods of its configuration, one or a union, put together."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

from polygraft.adapters.adapterhub.bottleneck import compile_bottlenecks
from polygraft.adapters.adapterhub.coupling import inverts_before_head
from polygraft.adapters.adapterhub.layers import base_layers
from polygraft.adapters.adapterhub.lora import compile_lora
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.prefix import compile_prefix
from polygraft.adapters.adapterhub.source import Method, Parts, Source
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid

UNION = "union"
METHODS: Mapping[str | None, Method] = {
    None: compile_bottlenecks,  # the library's configuration of bottlenecks has no name of its own
    "prefix_tuning": compile_prefix,
    "lora": compile_lora,
}
"""By `architecture`."""
KINDS = ("bottleneck", "ia3", "lora", "prefix_tuning", "union", "vera")
"""What compiled ones are called."""
MAX_METHODS = 16
"""Of a union."""
_WHY_NOT: Mapping[str, str] = {
    "prompt_tuning": "the library runs it on no decoder-only model",
    "reft": "it changes tokens by their place from both ends of a prompt, which no primitive does",
    "mtl_lora": "it has weights for each of several tasks, which no primitive chooses among",
}
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)")


def compile_adapterhub(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a folder of AdapterHub's; yields between modules. Problems are noted in the reader.

    Raises:
        AdapterInvalid: it doesn't tell what it is, is another base's, or a method isn't served.
    """
    config = reader.option("config", dict, {})
    if not config:
        reader.problems.append("config must hold a method's options")
    source = _take_source(reader, base, config)
    if source is None:  # nothing else can be told apart without it
        raise AdapterInvalid(reader.name, reader.problems)
    blocks = config.get("configs") if config.get("architecture") == UNION else None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        blocks = None
    if blocks is not None and len(blocks) > MAX_METHODS:
        reader.problems.append(f"config.configs has {len(blocks)} entries, the limit is {MAX_METHODS}")
        raise AdapterInvalid(reader.name, reader.problems)
    kind, whole = "", Parts(UNION)
    named = {"config": config} if blocks is None else dict(_named(blocks))
    for where, block in named.items():
        parts = yield from _compile_block(source, Options(reader, block, where))
        kind = parts.kind if blocks is None else UNION
        _join(reader, whole, parts)
    if not reader.problems and _is_empty(whole):
        reader.problems.append("it has weights for nothing in the base")
    return AdapterWeights(
        kind,
        reader.parameters,
        whole.modules,
        bottlenecks=whole.bottlenecks,
        coupling=whole.coupling,
        prefix=whole.prefix,
    )


def _named(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"config.configs[{at}]", block) for at, block in enumerate(blocks)]


def _take_source(reader: FolderReader, base: BaseSpec, config: dict[str, Any]) -> Source | None:
    """Take what the folder says of itself and of its base; None after noting a problem."""
    name = reader.option("name", str, "")
    model_type = reader.option("model_type", str, base.architecture)
    hidden = reader.option("hidden_size", int, base.hidden_size)
    version = reader.option("version", str, "")
    model_class = reader.option("model_class", str, "")
    reader.check_base_name(base, reader.option("model_name", str, ""))
    reader.ignore("type")  # of task, in old versions
    if not name:
        reader.problems.append("name is missing, which is part of the tensors' names")
    if hidden != base.hidden_size:
        reader.problems.append(f"hidden_size is {hidden}, the base has {base.hidden_size}")
    if model_type != base.architecture:
        # Where adapters act depends on it.
        reader.problems.append(f"model_type is {shown(model_type)}, the base is {base.architecture!r}")
    layers = base_layers(base)
    if layers is None:
        reader.problems.append("the base's layers aren't one list, as AdapterHub's adapters need")
    if reader.problems or layers is None:
        return None
    return Source(
        reader,
        base,
        layers,
        name,
        old_activations=not version,
        # adapters/loading.py, _fix_backward_compat
        unscaled_lora=_is_before_1_1(version) and config.get("architecture") == "lora",
        inverts=inverts_before_head(model_type, model_class),
    )


def _is_before_1_1(version: str) -> bool:
    match = _VERSION.match(version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _compile_block(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Raises AdapterInvalid if the method isn't served."""
    architecture = options.take("architecture", str, None)
    method = METHODS.get(architecture)
    if method is None:
        why = f", {_WHY_NOT[architecture]}" if architecture in _WHY_NOT else ""
        served = ", ".join(sorted(name for name in METHODS if name))
        options.refuse("architecture", architecture, f"isn't served{why} ({served} and {UNION} are)")
        raise AdapterInvalid(source.reader.name, source.reader.problems)
    parts = Parts("")
    with source.reader.noting():
        parts = yield from method(source, options)
    options.finish()
    return parts


Item = TypeVar("Item")


def _join(reader: FolderReader, whole: Parts, parts: Parts) -> None:
    """Add a method's parts to those of the methods before it; the library too takes one for each place."""

    def join(have: dict[str, Item], more: dict[str, Item]) -> None:
        for name in have.keys() & more.keys():
            reader.problems.append(f"two methods have weights for {name}")
        have.update(more)

    join(whole.modules, parts.modules)
    join(whole.bottlenecks, parts.bottlenecks)
    if (whole.coupling and parts.coupling) or (whole.prefix and parts.prefix):
        reader.problems.append("two methods have an invertible adapter or a prefix")
    whole.coupling = whole.coupling or parts.coupling
    whole.prefix = whole.prefix or parts.prefix


def _is_empty(parts: Parts) -> bool:
    return not (parts.modules or parts.bottlenecks or parts.coupling or parts.prefix)
