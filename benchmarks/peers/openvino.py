"""OpenVINO GenAI; it takes one adapter a call, so that a mixed batch is groups one after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai
from openvino import Tensor

from benchmarks.peers.cases import CASES, Ask, answer, by_adapter
from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS, RANK, adapter_names

ALPHA = RANK / RANK
"""What the product of the two factors is scaled by; GenAI reads no adapter configuration."""


class OpenVino:
    """A pipeline that knows all adapters of the mixed batch; each call chooses one, or none."""

    def __init__(self, model: Path, store: Path) -> None:
        self._adapters = {
            name: openvino_genai.Adapter(store / name / "adapter_model.safetensors")
            for name in adapter_names()
        }
        known = openvino_genai.AdapterConfig([(adapter, ALPHA) for adapter in self._adapters.values()])
        options = {"INFERENCE_NUM_THREADS": 2, "ENABLE_MMAP": True}
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", adapters=known, **options)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = NEW_TOKENS
        config.do_sample = False
        config.ignore_eos = True
        self._config = config

    def run(self, case: str) -> dict[str, Any]:
        """Answer all requests of a case."""
        asks = CASES[case]
        outputs: list[list[int]] = [[] for _ in asks]
        started = time.perf_counter()
        for positions in by_adapter(asks):
            answers = self._generate([asks[n] for n in positions])
            for n, tokens in zip(positions, answers, strict=True):
                outputs[n] = tokens
        return answer(outputs, time.perf_counter() - started)

    def _generate(self, asks: Sequence[Ask]) -> list[list[int]]:
        ids = np.array([ask.prompt for ask in asks], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        name = asks[0].adapter
        chosen = [(self._adapters[name], ALPHA)] if name else []
        adapters = openvino_genai.AdapterConfig(chosen)
        answers: list[list[int]] = self._pipeline.generate(inputs, self._config, adapters=adapters).tokens
        return answers


def main() -> None:
    model, store = sys.argv[1:]
    answer_rounds(OpenVino(Path(model), Path(store)).run)


if __name__ == "__main__":
    main()
