"""The sample adapters of one task side by side: what each kind takes, scores and costs.

    OMP_NUM_THREADS=2 python -m benchmarks.sample_kinds [--rounds 15] [--document adapters/README.md]

Parameters and bytes are those of the folders, scores those of the cards (`adapters/evaluate.py` measures
them). Latency is measured here: one request at a time through a server, greedy, held-out messages. Adapters
and the base take turns, and every round sends another message, so that of a prompt only the chat template's
beginning is found in the cache. QLoRA's adapter is asked afterwards, on a second server whose base is
quantized as its own. Prints a table; `--document` puts it between its markers.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.rounds import Figures, in_turn
from benchmarks.suite.document import insert, table
from polygraft.adapters.limits import AdapterLimits
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.demo.launcher import ServerProcess, serve_command
from polygraft.engine.check import check_against
from polygraft_client import Client

STORE = Path(__file__).resolve().parents[1] / "adapters"
TASK = "ticket"
NEW_TOKENS = 16
KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
    "adalora": "AdaLoRA",
    "ia3": "(IA)³",
    "bottleneck": "bottleneck",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "p-tuning": "P-tuning",
}
ON_NF4 = {"qlora"}
"""Kinds that are served on an nf4 base."""


def card_scores(card: str, way: str) -> tuple[float, float]:
    """(base, adapter) of the first row of scores that starts with `way`: the adapter's own base is first."""
    found = re.search(rf"^\| {way}[^|]* \| ([01]\.\d+) \| ([01]\.\d+) \|", card, re.MULTILINE)
    if found is None:
        raise ValueError(f"no row of scores {way}")
    return float(found[1]), float(found[2])


@contextmanager
def serving(quantization: str) -> Iterator[Client]:
    """A server of the sample store."""
    command = serve_command(
        "--adapters",
        str(STORE),
        "--quantization",
        quantization,
        "--kv-cache-bytes",
        "64MiB",
        "--threads",
        "2",
    )
    with ServerProcess(command) as server:
        with Client(server.wait_ready(300, report=lambda line: None).grpc) as client:
            yield client
        server.stop()


def asked(client: Client, adapter: str | None, messages: list[str]) -> Callable[[int], Figures]:
    """One request of a round, in milliseconds."""

    def ask(number: int) -> Figures:
        chat = [{"role": "user", "content": messages[number % len(messages)]}]
        answer = client.generate(
            chat=chat, adapter=adapter, temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True
        )
        first, total = answer.timings.time_to_first_token, answer.timings.total
        return {"first": 1000 * first, "further": 1000 * (total - first) / (NEW_TOKENS - 1)}

    return ask


def latencies(quantization: str, names: list[str], messages: list[str], rounds: int) -> dict[str, Figures]:
    """Medians by adapter, and of the base itself by "", on a server of their own; nothing without rounds."""
    if rounds == 0:
        return {}
    with serving(quantization) as client:
        sides = {name: asked(client, name or None, messages) for name in ("", *names)}
        measured = in_turn(sides, rounds)
    return {
        name: {key: statistics.median(figures[key] for figures in each) for key in each[0]}
        for name, each in measured.items()
    }


def card_of(kind: str) -> str:
    return (STORE / f"{TASK}-{kind}" / "README.md").read_text(encoding="utf-8")


def row(shown: str, card: str, side: int, took: Figures | None) -> dict[str, str]:
    """A row of the table, without what only adapters have.

    Args:
        side: of the card's scores: 0 the base, 1 the adapter.
        took: None if it wasn't measured.
    """
    return {
        "kind": shown,
        "parameters": "",
        "share of the base": "",
        "bytes": "",
        "score, library": f"{card_scores(card, 'with ')[side]:.2f}",
        "score, server": f"{card_scores(card, 'through the server')[side]:.2f}",
        "first token, ms": f"{took['first']:.0f}" if took else "",
        "a further token, ms": f"{took['further']:.1f}" if took else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="0 leaves latency out")
    parser.add_argument("--document", type=Path, help="put the table between its markers")
    arguments = parser.parse_args()
    found = importlib.util.spec_from_file_location("ticket", STORE / f"{TASK}.py")
    assert found is not None
    assert found.loader is not None
    task = importlib.util.module_from_spec(found)
    found.loader.exec_module(task)
    messages = [message for message, _ in task.held_out_examples()]
    messages = messages[::7] + messages[3::7]  # from every queue in turn
    base = inspect_without_weights("default")
    rows: list[dict[str, str]] = []
    for quantization, shown in (("none", "base alone"), ("nf4", "base alone, nf4")):
        kinds = [kind for kind in KINDS if (kind in ON_NF4) == (quantization == "nf4")]
        measured = latencies(quantization, [f"{TASK}-{kind}" for kind in kinds], messages, arguments.rounds)
        rows.append(row(shown, card_of(kinds[0]), 0, measured.get("")))
        for kind in kinds:
            name = f"{TASK}-{kind}"
            report = check_against(STORE / name, base, AdapterLimits())
            assert report.fits, report.problems
            weights = next((STORE / name).glob("*.safetensors")).stat().st_size
            held = {
                "parameters": f"{report.parameters:,}",
                "share of the base": f"{100 * report.share_of_base:.3f} %",
                "bytes": f"{weights:,}",
            }
            rows.append(row(f"[{KINDS[kind]}]({name})", card_of(kind), 1, measured.get(name)) | held)
    text = table(rows)
    print(f"\n{text}")
    if arguments.document:
        insert(arguments.document, "kinds", text)


if __name__ == "__main__":
    main()
