"""What the comparison with other systems rests on, without installing any of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.answers import Outputs, WrongAnswers, agreement, check_adapters
from benchmarks.peers.cases import CASES, IN_FLIGHT, REGISTERED, TITLES, answer, by_adapter
from benchmarks.peers.catalog import Artifact, Peer
from benchmarks.peers.environment import Unavailable, prepare
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, requests


def test_the_cases_are_workload_w() -> None:
    assert [(ask.prompt, ask.adapter) for ask in CASES["mixed-16"]] == requests()
    assert {len(ask.prompt) for asks in CASES.values() for ask in asks} == {PROMPT_TOKENS}
    assert CASES.keys() == TITLES.keys()


def test_the_largest_case_spreads_over_the_store() -> None:
    used = [ask.adapter for ask in CASES["mixed-100"]]
    assert len(set(used)) == len(used) <= REGISTERED


def test_a_server_without_mixing_batches_an_adapter_s_requests_of_one_window() -> None:
    assert by_adapter(CASES["mixed-16"]) == [[n, n + 8] for n in range(8)]
    assert by_adapter(CASES["base-16"]) == [list(range(IN_FLIGHT))]
    assert sorted(n for group in by_adapter(CASES["mixed-100"]) for n in group) == list(
        range(len(CASES["mixed-100"]))
    )


def test_a_short_answer_is_no_answer() -> None:
    assert answer([[1] * NEW_TOKENS] * 2, 2.0)["tokens_per_s"] == NEW_TOKENS
    with pytest.raises(ValueError, match="63"):
        answer([[1] * NEW_TOKENS, [1] * 63], 1.0)


APPLIED = {
    "base-1": [[1, 2]],
    "lora-1": [[1, 3]],
    "base-16": [[1, 2], [5, 6]],
    "lora-16": [[1, 3], [5, 7]],
    "mixed-16": [[1, 3], [5, 8]],
}


def test_adapters_that_are_applied_pass() -> None:
    check_adapters(APPLIED)
    check_adapters({"mixed-16": APPLIED["mixed-16"]})


@pytest.mark.parametrize(
    ("case", "answers"),
    [
        ("lora-1", [[1, 2]]),
        ("lora-16", APPLIED["base-16"]),
        ("mixed-16", APPLIED["base-16"]),
        ("mixed-16", APPLIED["lora-16"]),
    ],
)
def test_an_adapter_that_changes_nothing_is_found(case: str, answers: Outputs) -> None:
    with pytest.raises(WrongAnswers, match=case):
        check_adapters(APPLIED | {case: answers})


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 2


def test_the_cases_need_no_package() -> None:
    code = "import sys, benchmarks.peers.cases, benchmarks.sides.protocol; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_files_are_made_whole_once_or_not_at_all(tmp_path: Path) -> None:
    code = "import os, sys; os.mkdir(sys.argv[1]); sys.exit(sys.argv[2])"
    failing = Peer("p", (), (), artifacts=(Artifact("files", ("-c", code, "{out}", "no luck")),))
    with pytest.raises(Unavailable, match="no luck"):
        prepare(failing, tmp_path)
    assert not (tmp_path / "p" / "files").exists()
    working = Peer(
        "p", (), (), artifacts=(Artifact("files", ("-c", "import os, sys; os.mkdir(sys.argv[1])", "{out}")),)
    )
    prepare(working, tmp_path)
    prepare(failing, tmp_path)
    assert (tmp_path / "p" / "files").is_dir()
