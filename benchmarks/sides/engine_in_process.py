"""The engine stepped in its own process: no gRPC, no event loop, no other thread."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS, requests
from polygraft.config import ServerConfig
from polygraft.engine.load_engine import load_engine
from polygraft_types.requests import AdapterRef, Request, StoppingParams


def main() -> None:
    engine = load_engine(
        ServerConfig(
            adapters=Path(sys.argv[1]),
            quantization=sys.argv[2],
            dtype=sys.argv[3],
            threads=2,
            kv_cache_bytes=128 * 2**20,
            prefix_caching=False,  # rounds repeat their prompts
        )
    )

    def run(what: str) -> dict[str, Any]:
        started = time.perf_counter()
        outputs = engine.generate(
            Request(
                str(n),
                tuple(prompt),
                adapters=(AdapterRef(name),) if what == "mixed" else (),
                stopping=StoppingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            )
            for n, (prompt, name) in enumerate(requests())
        )
        seconds = time.perf_counter() - started
        return {"tokens_per_s": sum(len(o.token_ids) for one in outputs for o in one) / seconds}

    answer_rounds(run)


if __name__ == "__main__":
    main()
