"""How the benchmark suite puts figures into the document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.suite.__main__ import EXPERIMENTS
from benchmarks.suite.document import draw, insert, publish, table
from benchmarks.suite.experiment import Experiment, Plot, interleave
from benchmarks.suite.step_costs import fit

ROWS = [{"n": 1, "step, ms": 12.34}, {"n": 2, "step, ms": 123.4}]
PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_a_table_keeps_three_figures() -> None:
    assert table(ROWS) == "| n | step, ms |\n|---|---|\n| 1 | 12.3 |\n| 2 | 123 |"
    assert table([{"ratio": 0.987}]).endswith("| 0.99 |")


def test_an_experiment_s_place_is_found_and_nothing_else_changes(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb <!-- bench:xy --><!-- /bench:xy -->\n"
    )
    insert(document, "x", r"new \1")
    assert document.read_text() == (
        "a\n<!-- bench:x -->\nnew \\1\n<!-- /bench:x -->\nb <!-- bench:xy --><!-- /bench:xy -->\n"
    )
    with pytest.raises(ValueError, match="0 places for y"):
        insert(document, "y", "new")


@pytest.mark.parametrize("name", [*EXPERIMENTS, "machine"])
def test_every_experiment_has_its_place_in_the_docs(name: str) -> None:
    text = PERFORMANCE.read_text()
    assert text.count(f"<!-- bench:{name} -->") == text.count(f"<!-- /bench:{name} -->") == 1


def test_the_same_figures_give_the_same_plot(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("<!-- bench:x --><!-- /bench:x -->")
    experiment = Experiment("x", lambda rounds: ROWS, Plot("n", ("step, ms",)))
    publish(experiment, ROWS, document)
    assert "![x](plots/x.svg)" in document.read_text()
    assert experiment.plot is not None
    draw(experiment.plot, ROWS, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "plots" / "x.svg").read_bytes()


def test_rounds_are_interleaved_and_the_first_isnt_counted() -> None:
    calls: list[str] = []

    def side(name: str, values: list[float]) -> Callable[[int], dict[str, float]]:
        def run(n: int) -> dict[str, float]:
            calls.append(f"{name}{n}")
            return {"value": values[n]}

        return run

    sides = {"a": side("a", [100, 1, 5, 3]), "b": side("b", [0, 2, 2, 2])}
    assert interleave(sides, 3) == {"a": {"value": 3}, "b": {"value": 2}}
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]


def test_a_line_is_fitted_and_never_falls() -> None:
    assert fit([1, 2, 4, 8], [12, 14, 18, 26]) == pytest.approx((10, 2))
    fixed, slope = fit([1, 2, 4], [3, 2, 1])
    assert (fixed, slope) == (pytest.approx(2), 0.0)
