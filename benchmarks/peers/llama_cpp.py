"""llama.cpp through its batch interface: one adapter a context, so mixed is groups one after another."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.cases import CASES, IN_FLIGHT, Ask, answer, by_adapter
from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, adapter_names

THREADS = 2


class LlamaCpp:
    """A model with all adapters of the mixed batch loaded; each group of requests chooses one, or none."""

    def __init__(self, folder: Path, precision: str) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(bytes(folder / f"{precision}.gguf"), options)
        assert self._model
        self._adapters = {}
        for name in adapter_names():
            adapter = llama_cpp.llama_adapter_lora_init(self._model, bytes(folder / f"{name}.gguf"))
            assert adapter, name
            self._adapters[name] = adapter
        shape = llama_cpp.llama_context_default_params()
        shape.n_seq_max = IN_FLIGHT
        shape.n_ctx = IN_FLIGHT * 2 * (PROMPT_TOKENS + NEW_TOKENS)
        shape.n_batch = IN_FLIGHT * PROMPT_TOKENS
        shape.n_threads = shape.n_threads_batch = THREADS
        self._context = llama_cpp.llama_init_from_model(self._model, shape)
        assert self._context
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(IN_FLIGHT * PROMPT_TOKENS, 0, 1)

    def run(self, case: str) -> dict[str, Any]:
        """Answer all requests of a case."""
        asks = CASES[case]
        outputs: list[list[int]] = [[] for _ in asks]
        started = time.perf_counter()
        for positions in by_adapter(asks):
            self._choose(asks[positions[0]].adapter)
            answers = self._generate([asks[n] for n in positions])
            for n, tokens in zip(positions, answers, strict=True):
                outputs[n] = tokens
        return answer(outputs, time.perf_counter() - started)

    def _choose(self, name: str | None) -> None:
        chosen = [self._adapters[name]] if name else []
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*[1.0 for _ in chosen])
        assert llama_cpp.llama_set_adapters_lora(self._context, pointers, len(chosen), scales) == 0

    def _generate(self, asks: Sequence[Ask]) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in asks]
        feed = [ask.prompt for ask in asks]
        start = 0
        for _ in range(NEW_TOKENS):
            for output, token in zip(outputs, self._step(feed, start), strict=True):
                output.append(token)
            start += len(feed[0])
            feed = [output[-1:] for output in outputs]
        return outputs

    def _step(self, feed: Sequence[Sequence[int]], start: int) -> list[int]:
        """Decode equally many tokens of each sequence from position `start`; the likeliest next ones."""
        batch = self._batch
        at = 0
        last = []
        for sequence, tokens in enumerate(feed):
            for offset, token in enumerate(tokens):
                batch.token[at] = token
                batch.pos[at] = start + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        assert llama_cpp.llama_decode(self._context, batch) == 0
        return [self._likeliest(n) for n in last]

    def _likeliest(self, at: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, at)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def main() -> None:
    folder, precision = sys.argv[1:]
    answer_rounds(LlamaCpp(Path(folder), precision).run)


if __name__ == "__main__":
    main()
