"""Measure base and adapter on the held-out examples of `adapters/<name>/eval.jsonl`.

    python adapters/evaluate.py [NAME ...]                           with PEFT
    python adapters/evaluate.py --library adapterhub [NAME ...]      with AdapterHub's (see adapterhub.py)
    python adapters/evaluate.py --server 127.0.0.1:50051 [NAME ...]  through a running server

`--update-cards` also writes the scores into the table of each adapter's `README.md`.

Greedy, one request at a time and unpadded. The libraries compute in float32, on the base that the adapter was
trained on or the one that `--quantization` names; a server as it was started.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack

import recipe
from answering import Answer, Sides, with_adapterhub, with_peft, with_server
from recipe import ADAPTERS, Recipe

LIBRARIES = {"peft": ("with PEFT", with_peft), "adapterhub": ("with AdapterHub", with_adapterhub)}
UNQUANTIZED = "none"


def measure(made: Recipe, answer: Answer, show: int) -> float:
    """The mean score over the held-out examples."""
    scores = []
    for prompt, expected in recipe.read_held_out(made.name):
        said = answer(prompt, made.max_new_tokens)
        scores.append(made.score(prompt, expected, said.strip()))
        if len(scores) <= show:
            print(f"    {prompt!r}\n      wanted {expected!r}\n      said   {said!r}  {scores[-1]:.2f}")
    return statistics.fmean(scores)


def row_name(way: str, made: Recipe, quantization: str) -> str:
    """How a card's row of scores begins: it says on which base, unless that is the adapter's own."""
    if quantization == made.quantization:
        return way
    return f"{way}, {'unquantized' if quantization == UNQUANTIZED else quantization} base"


def update_card(name: str, row: str, scores: dict[str, float], count: int) -> None:
    """Replace the row of the card's score table that starts with `row`."""
    path = ADAPTERS / name / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith(f"| {row} |")]
    assert len(found) == 1, f"{path}: expected one row that starts with '| {row} |'"
    lines[found[0]] = f"| {row} | {scores['base']:.3f} | {scores['adapter']:.3f} | {count} |"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="adapters to measure (default: all)")
    parser.add_argument("--server", metavar="HOST:PORT", help="measure through this server")
    parser.add_argument("--library", choices=LIBRARIES, default="peft", help="measure with this library")
    parser.add_argument("--quantization", choices=(UNQUANTIZED, "nf4"), help="of the library's base")
    parser.add_argument("--only", choices=("base", "adapter"), help="measure only one of the two")
    parser.add_argument("--update-cards", action="store_true", help="write the scores into the cards")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N answers")
    arguments = parser.parse_args()

    with ExitStack() as stack:
        open_sides: Callable[[str, str], Sides]
        if arguments.server:
            from polygraft_client import Client

            client = stack.enter_context(Client(arguments.server))
            way, served = "through the server", client.model().quantization

            def open_sides(name: str, quantization: str) -> Sides:
                return with_server(client, name)

        else:
            (way, open_sides), served = LIBRARIES[arguments.library], arguments.quantization
        bases: dict[tuple[object, ...], float] = {}
        for name in arguments.names or recipe.names():
            made = recipe.load(name)
            if not arguments.server and bool(made.bottleneck) != (arguments.library == "adapterhub"):
                print(f"{name}: not in the form of this library")
                continue
            quantization = served or made.quantization
            row, sides = row_name(way, made, quantization), open_sides(name, quantization)
            # Adapters of one task are measured against the same base, once.
            task = (quantization, made.score, tuple(made.held_out))
            scores: dict[str, float] = {}
            for who, answer in (("base", sides.base), ("adapter", sides.adapter)):
                if arguments.only in (None, who):
                    known = bases.get(task) if who == "base" else None
                    scores[who] = measure(made, answer, arguments.show) if known is None else known
                    print(
                        f"{name} {who}: {scores[who]:.3f} on {len(made.held_out)} examples, {row}", flush=True
                    )
            if "base" in scores:
                bases[task] = scores["base"]
            if arguments.update_cards and len(scores) == 2:
                update_card(name, row, scores, len(made.held_out))


if __name__ == "__main__":
    main()
