"""What figures were measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import psutil

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def describe() -> dict[str, str]:
    """The processor, what it can do, and the versions that matter."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in info.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    has = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family, model": f"{fields.get('cpu family', '?')}, {fields.get('model', '?')}",
        "instructions": " ".join(flag for flag in FLAGS if flag in has) or "none of " + " ".join(FLAGS),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "grpcio")},
    }
