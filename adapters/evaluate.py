"""Measure base and adapter on the held-out examples of `adapters/<name>/eval.jsonl`.

    python adapters/evaluate.py [NAME ...]                           with PEFT and transformers
    python adapters/evaluate.py --server 127.0.0.1:50051 [NAME ...]  through a running server

`--update-cards` also writes the scores into the table of each adapter's `README.md`.

Greedy, one request at a time and unpadded, in float32 (through the server: in the server's dtype).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import recipe
from recipe import ADAPTERS
from scoring import score

Answer = Callable[[str, int], str]
"""From a prompt and the largest number of new tokens to the answer's text."""


def measure(name: str, answer: Answer, show: int) -> tuple[float, int]:
    """The mean score over the held-out examples, and their number."""
    limit = recipe.load(name).max_new_tokens
    scores = []
    for prompt, expected in recipe.read_held_out(name):
        said = answer(prompt, limit)
        scores.append(score(name, prompt, expected, said))
        if len(scores) <= show:
            print(f"    {prompt!r}\n      wanted {expected!r}\n      said   {said!r}  {scores[-1]:.2f}")
    return statistics.fmean(scores), len(scores)


def update_card(name: str, way: str, scores: dict[str, float], count: int) -> None:
    """Replace the row of the card's score table that starts with `way`."""
    path = ADAPTERS / name / "README.md"
    row = f"| {way} | {scores['base']:.3f} | {scores['adapter']:.3f} | {count} |"
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith(f"| {way} |")]
    assert len(found) == 1, f"{path}: expected one row that starts with '| {way} |'"
    lines[found[0]] = row
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_peft(names: Iterable[str], report: Callable[[str, str, Answer], None]) -> None:
    """Answer with PEFT's own generate; the base is the same model with the adapter switched off."""
    import torch
    from peft import PeftModel
    from train import chat_ids, load_base

    for name in names:
        base, tokenizer = load_base()
        model = PeftModel.from_pretrained(base, ADAPTERS / name).eval()

        def generate(prompt: str, limit: int, model=model, tokenizer=tokenizer) -> str:  # type: ignore[no-untyped-def]
            ids = torch.tensor([chat_ids(tokenizer, prompt)])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
                )
            return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

        for who, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
            with context:
                report(name, who, generate)


def with_server(address: str, names: Iterable[str], report: Callable[[str, str, Answer], None]) -> None:
    """Answer through a running server that has the adapters loaded."""
    from polygraft_client import Client

    with Client(address) as client:
        for name in names:
            for who, adapter in (("base", None), ("adapter", name)):

                def generate(prompt: str, limit: int, adapter: str | None = adapter) -> str:
                    chat = [{"role": "user", "content": prompt}]
                    made = client.generate(chat=chat, adapter=adapter, max_new_tokens=limit, temperature=0.0)
                    return made.text

                report(name, who, generate)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="adapters to measure (default: all)")
    parser.add_argument("--server", metavar="HOST:PORT", help="measure through this server")
    parser.add_argument("--only", choices=("base", "adapter"), help="measure only one of the two")
    parser.add_argument("--update-cards", action="store_true", help="write the scores into the cards")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N answers")
    arguments = parser.parse_args()

    way = "through the server" if arguments.server else "with PEFT"
    means: dict[str, dict[str, float]] = {}

    def report(name: str, who: str, answer: Answer) -> None:
        if arguments.only in (None, who):
            mean, count = measure(name, answer, arguments.show)
            print(f"{name} {who}: {mean:.3f} on {count} examples, {way}", flush=True)
            means.setdefault(name, {})[who] = mean
            if arguments.update_cards and len(means[name]) == 2:
                update_card(name, way, means[name], count)

    names = arguments.names or recipe.names()
    if arguments.server:
        with_server(arguments.server, names, report)
    else:
        with_peft(names, report)


if __name__ == "__main__":
    main()
