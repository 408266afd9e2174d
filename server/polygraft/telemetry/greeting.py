"""What a server says when it is ready: what it serves, where, and a command to try."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from polygraft.addresses import Address
from polygraft.config import ServerConfig
from polygraft.engine.client import ModelInfo
from polygraft_types.adapters import AdapterInfo, AdapterState

_PROMPT = "Maria Lopez, 34, is a teacher from Madrid."
"""The default model answers it well, alone and with most of the samples."""


def greeting(
    model: ModelInfo, adapters: Sequence[AdapterInfo], listening: Address, scraped: Address | None
) -> list[str]:
    """The lines for the log.

    Args:
        adapters: all that the registry knows, failed ones included.
        listening: the gRPC server's address.
        scraped: the metrics endpoint's, None where it is off.
    """
    return [
        f"serving {model.model} ({model.parameters / 1e6:,.0f}M parameters, {_precision(model)}, on "
        f"{model.device}) with {_adapters(adapters)}",
        f"gRPC on {listening}; "
        + (f"/metrics, /healthz and /readyz on http://{scraped}" if scraped else "metrics are off"),
        f"try: {command_to_try(adapters, listening)}",
    ]


def command_to_try(adapters: Sequence[AdapterInfo], listening: Address) -> str:
    """A command that works on this machine with what is loaded."""
    command = ["polygraft", "generate", _PROMPT]
    ready = [info for info in adapters if info.state == AdapterState.READY]
    if ready:
        # LoRA is what most people have; the first by name otherwise.
        command += ["--adapter", min(ready, key=lambda info: (info.kind != "lora", info.name)).name]
    server = _from_here(listening)
    if str(server) != ServerConfig.model_fields["listen"].default:
        command += ["--server", str(server)]
    return shlex.join(command)


def _from_here(listening: Address) -> Address:
    """The address as a client on this machine calls it."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not listened on
    return Address(listening.flag, anywhere.get(listening.host, listening.host), listening.port)


def _precision(model: ModelInfo) -> str:
    return model.dtype if model.quantization == "none" else f"{model.dtype} with {model.quantization} weights"


def _adapters(adapters: Sequence[AdapterInfo]) -> str:
    kinds = Counter(info.kind for info in adapters if info.state == AdapterState.READY)
    ready = sum(kinds.values())
    text = "1 adapter" if ready == 1 else f"{ready or 'no'} adapters"
    if kinds:
        text += f" ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"
    if failed := sum(info.state == AdapterState.FAILED for info in adapters):
        text += f"; {failed} failed to load, `polygraft adapters list` says why"
    return text
