"""Turns what was measured into a Markdown page and a JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.answers import agreement
from benchmarks.peers.cases import TITLES
from benchmarks.peers.rounds import Measured

REFERENCE = "PEFT, one adapter at a time"
AGREEMENT_CASE = "mixed-16"


def summary(
    results: Mapping[str, Measured],
    failures: Mapping[str, str],
    packages: Mapping[str, Mapping[str, str]],
    machine: Mapping[str, str],
) -> dict[str, Any]:
    """Everything, ready for JSON.

    Args:
        failures: by peer or system, those that didn't run, with the reason.
        packages: versions by peer.
    """
    references = (m.outputs.get(AGREEMENT_CASE) for name, m in results.items() if name.startswith(REFERENCE))
    reference = next(references, None)
    systems = {}
    for name, measured in results.items():
        outputs = measured.outputs.get(AGREEMENT_CASE)
        systems[name] = {
            "medians": {
                case: {figure: statistics.median(values) for figure, values in figures.items()}
                for case, figures in measured.figures.items()
            },
            "rounds": measured.figures,
            "tokens_as_reference": agreement(outputs, reference) if outputs and reference else None,
        }
    return {"machine": machine, "packages": packages, "systems": systems, "failures": failures}


def markdown(result: Mapping[str, Any], cases: Sequence[str]) -> str:
    """The tables: throughput, time to the first token, ratios, what didn't run, and versions."""
    systems = {name: system["medians"] for name, system in result["systems"].items() if system["medians"]}
    sections = [
        ", ".join(f"{key} {value}" for key, value in result["machine"].items()),
        "Output tokens per second, medians. The last case is measured once, and only where it is the "
        "point: in a server that mixes adapters, and in one that runs them one at a time.",
        _table(cases, {name: _column(medians, cases, "tokens_per_s") for name, medians in systems.items()}),
    ]
    first_tokens = {name: _column(medians, cases, "ttft_s", 2) for name, medians in systems.items()}
    first_tokens = {name: row for name, row in first_tokens.items() if any(row)}
    if first_tokens:
        sections += ["Seconds to the first token, medians:", _table(cases, first_tokens)]
    rounds = {name: system["rounds"] for name, system in result["systems"].items()}
    for ours in (name for name in systems if name.startswith("Polygraft")):
        ratios = {
            name: [_ratio(rounds[ours], rounds[name], case) for case in cases]
            for name in systems
            if name != ours
        }
        if ratios:
            sections += [
                f"{ours} ÷ each, tokens per second, medians of the rounds' own ratios:",
                _table(cases, ratios),
            ]
    agreements = {
        name: system["tokens_as_reference"]
        for name, system in result["systems"].items()
        if system["tokens_as_reference"] is not None
    }
    if agreements:
        lines = [f"- {name}: {tokens:.1f}" for name, tokens in agreements.items()]
        sections += [
            f"Tokens of an answer before it differs from {REFERENCE} (case {AGREEMENT_CASE}):",
            "\n".join(lines),
        ]
    if result["failures"]:
        sections += ["Not measured:", "\n".join(f"- {k}: {v}" for k, v in result["failures"].items())]
    versions = [
        f"- {peer}: {', '.join(f'{k} {v}' for k, v in have.items())}"
        for peer, have in result["packages"].items()
    ]
    return "\n\n".join([*sections, "Versions:", "\n".join(versions)])


def _column(
    medians: Mapping[str, Mapping[str, float]], cases: Sequence[str], figure: str, digits: int = 1
) -> list[str]:
    return [
        f"{medians[case][figure]:.{digits}f}" if figure in medians.get(case, {}) else "" for case in cases
    ]


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], case: str) -> str:
    if case not in ours or case not in theirs:
        return ""
    # A system that dropped out has fewer rounds.
    pairs = zip(ours[case]["tokens_per_s"], theirs[case]["tokens_per_s"], strict=False)
    return f"{statistics.median(one / other for one, other in pairs):.2f}"


def _table(cases: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = ["system", *(TITLES[case] for case in cases)]
    body = [[name, *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])
