"""Writes the tables of kinds into docs/reference/kinds.md: `make docs-tables`.

python -m tools.docs_tables           writes them
python -m tools.docs_tables --check   fails if they aren't what it would write
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from polygraft.adapters.files.refusals import WHY_NOT_KINDS
from polygraft.adapters.kind import Kind
from polygraft.adapters.kinds import KINDS

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference" / "kinds.md"
BEGIN, END = "<!-- made by `make docs-tables`: {} -->", "<!-- end: {} -->"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    columns = list(head)
    lines = [columns, *rows]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join((first, "|---" * len(columns) + "|", *others))


def served(kinds: Mapping[str, type[Kind]] = KINDS) -> str:
    """Return the table of PEFT's kinds that are served, one row for each variant."""
    head = ("kind", "`peft_type`", "steps", "runs as", "cost in a step")
    return table(head, (row for kind in kinds.values() for row in _rows_of(kind)))


def _rows_of(kind: type[Kind]) -> Iterator[tuple[str, ...]]:
    paper = f" ([{kind.paper}](https://arxiv.org/abs/{kind.paper}))" if kind.paper else ""
    for row in kind.rows:
        name = f"`{kind.peft_type}`{f', {row.where}' if row.where else ''}"
        yield kind.title + paper, name, "merged only" if row.merged_only else "mixed", row.runs_as, row.cost


def refused() -> str:
    """Return the table of PEFT's kinds that aren't served."""
    rows = ((f"`{name}`", why) for name, why in WHY_NOT_KINDS.items())
    return table(("`peft_type`", "isn't served, since"), rows)


TABLES = {"served": served, "refused": refused}


def filled(text: str) -> str:
    """Return a document with the tables between their markers."""
    for name, make in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, found = pattern.subn(
            lambda _, begin=begin, make=make, end=end: f"{begin}\n{make()}\n{end}", text
        )
        if found != 1:
            raise SystemExit(f"{DOCUMENT.name} must have the marker {begin!r} once, it has it {found} times")
    return text


def main() -> None:
    """Write or check the document."""
    before = DOCUMENT.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(after, encoding="utf-8")
    elif after != before:
        raise SystemExit(f"the tables of docs/reference/{DOCUMENT.name} are stale: make docs-tables")


if __name__ == "__main__":
    main()
