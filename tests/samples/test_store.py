"""The sample store: every folder has all that it should, and fits the default model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from polygraft.adapters.limits import AdapterLimits
from polygraft.base.loader import inspect_without_weights
from polygraft.core.spec import BaseSpec
from polygraft.engine.check import check_against

SAMPLES = Path(__file__).resolve().parents[2] / "adapters"
NAMES = sorted(path.parent.name for path in SAMPLES.glob("*/recipe.py"))
OF_ONE_TASK = {
    "ticket-adalora": "adalora",
    "ticket-bottleneck": "bottleneck",
    "ticket-dora": "lora",
    "ticket-ia3": "ia3",
    "ticket-lora": "lora",
    "ticket-p-tuning": "p_tuning",
    "ticket-prefix": "prefix_tuning",
    "ticket-prompt": "prompt_tuning",
    "ticket-qlora": "lora",
}
SCORES = re.compile(
    r"\| (?P<way>[^|]+) \| (?P<base>[01]\.\d{3}) \| (?P<adapter>[01]\.\d{3}) \| (?P<count>\d+) \|"
)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The module by which recipes are found; it and they import one another by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SAMPLES))
        import recipe

        yield recipe
    for name in ("recipe", "ticket"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base() -> BaseSpec:
    return inspect_without_weights("default")


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_fits_the_default_model(name: str, base: BaseSpec) -> None:
    report = check_against(SAMPLES / name, base, AdapterLimits())
    assert (report.fits, report.problems, report.warnings) == (True, (), ())
    if name in OF_ONE_TASK:
        assert report.kind == OF_ONE_TASK[name]


def test_one_task_has_every_kind() -> None:
    assert {name for name in NAMES if name.startswith("ticket-")} == OF_ONE_TASK.keys()


@pytest.mark.parametrize("name", NAMES)
def test_held_out_examples_are_the_recipes(name: str, recipe: ModuleType) -> None:
    assert recipe.read_held_out(name) == recipe.load(name).held_out


@pytest.mark.parametrize("name", NAMES)
def test_card_has_measured_scores(name: str, recipe: ModuleType) -> None:
    rows = [match.groupdict() for match in SCORES.finditer((SAMPLES / name / "README.md").read_text())]
    ways = [row["way"] for row in rows]
    assert len([way for way in ways if way in ("with PEFT", "with AdapterHub")]) == 1
    assert ways.count("through the server") == 1
    for row in rows:
        assert int(row["count"]) == len(recipe.load(name).held_out)
        assert float(row["base"]) < float(row["adapter"])


def test_every_adapter_is_in_the_demo_and_the_table() -> None:
    asked = [entry["adapter"] for entry in json.loads((SAMPLES / "demo.json").read_text())]
    assert sorted(asked) == NAMES
    table = (SAMPLES / "README.md").read_text()
    assert [name for name in NAMES if f"]({name})" not in table] == []


def test_held_out_messages_have_words_of_their_own(recipe: ModuleType) -> None:
    import ticket

    def words(texts: list[str]) -> set[str]:
        return set().union(*map(ticket.content_words, texts))

    trained = words([prompt for prompt, _ in ticket.train_examples()])
    trained |= words([message for messages in ticket.TRAINING.values() for message in messages])
    held_out = [prompt for prompt, _ in ticket.held_out_examples()]
    assert trained & words(held_out) == set()
    assert trained & words(["My order is three days late."])
    assert len(held_out) == len(set(held_out)) == 96
    assert {label for _, label in ticket.held_out_examples()} == set(ticket.TRAINING)
