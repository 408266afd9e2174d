"""vLLM's CPU build, its engine in this process."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.peers.cases import CASES, IN_FLIGHT, Ask, answer
from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import ADAPTERS, NEW_TOKENS, PROMPT_TOKENS, RANK, adapter_names


class Vllm:
    """An engine with room for all adapters of the mixed batch."""

    def __init__(self, model: str, store: Path, dtype: str) -> None:
        self._loras = {
            # vLLM takes ids from 1.
            name: LoRARequest(name, n, str(store / name))
            for n, name in enumerate(adapter_names(), 1)
        }
        self._llm = LLM(
            model,
            dtype=dtype,
            max_model_len=PROMPT_TOKENS + NEW_TOKENS,
            max_num_seqs=IN_FLIGHT,
            enable_lora=True,
            max_loras=ADAPTERS,
            max_lora_rank=RANK,
            enforce_eager=True,  # its LoRA needs it on a CPU
            enable_prefix_caching=False,  # rounds repeat their prompts
            disable_log_stats=False,  # they carry the time to the first token
        )
        self._sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def run(self, case: str) -> dict[str, Any]:
        """Answer all requests of a case."""
        asks: list[Ask] = CASES[case]
        started = time.perf_counter()
        results = self._llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask in asks],
            self._sampling,
            lora_request=[self._loras[ask.adapter] if ask.adapter else None for ask in asks],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - started
        first_token = statistics.median(result.metrics.first_token_latency for result in results)
        return answer([result.outputs[0].token_ids for result in results], seconds, ttft_s=first_token)


def main() -> None:
    model, store, dtype = sys.argv[1:]
    answer_rounds(Vllm(model, Path(store), dtype).run)


if __name__ == "__main__":
    main()
