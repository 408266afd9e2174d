"""Adapters and check reports as rich tables. Cells are `Text`: nothing in a name is markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from polygraft_client import Adapter, AdapterState

if TYPE_CHECKING:
    from polygraft.engine.check import CheckReport

_STYLES = {AdapterState.READY: "green", AdapterState.FAILED: "red"}

NAME_WIDTH = 28
"""Least width of the column of names if there are longer ones, which are folded and never cut."""
SHOWN_REMARKS = 4
"""Most problems, and most warnings, of an adapter that are shown; JSON has all."""

_MERGED_ONLY = "on a merged copy only"


def adapters(found: Sequence[Adapter]) -> Group:
    """A row for each adapter, then a paragraph for each that failed or has a warning. Names are never cut."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    longest = max((len(adapter.name) for adapter in found), default=0)
    table.add_column("NAME", overflow="fold", min_width=min(longest, NAME_WIDTH))
    for column in ("STATE", "KIND", "SIZE"):
        table.add_column(column, overflow="fold")
    copies = any(adapter.merged is not None for adapter in found)
    if copies:
        table.add_column("MERGED", overflow="fold")
    for column in ("MEMORY", "RUNNING"):
        table.add_column(column, justify="right", no_wrap=True)
    for adapter in found:
        table.add_row(
            Text(adapter.name),
            Text(adapter.state.lower(), _STYLES.get(adapter.state, "yellow")),
            Text(adapter.kind),
            size(adapter.rank, adapter.virtual_tokens),
            *((merged(adapter) if adapter.merged is not None else "",) if copies else ()),
            decimal(adapter.compiled_bytes) if adapter.compiled_bytes else "",
            str(adapter.running_requests),
        )
    failed = [a for a in found if a.state is AdapterState.FAILED]
    counts = f"{len(found)} {'adapter' if len(found) == 1 else 'adapters'}"
    lines = [Text(counts + (f", {len(failed)} failed to load" if failed else ""))]
    for adapter in found:
        for texts, style in ((adapter.problems, "red"), (adapter.warnings, "yellow")):
            if texts:
                more = (
                    f" ({len(texts) - 1} more: polygraft adapters show {adapter.name})" if texts[1:] else ""
                )
                lines.append(Text.assemble((f"{adapter.name}: ", "bold"), (texts[0], style), more))
    return Group(table, "", *lines) if found else Group(*lines)


def adapter(shown: Adapter) -> Table:
    """Everything about one adapter."""
    table = _facts(
        name=shown.name,
        state=shown.state.lower(),
        kind=shown.kind,
        primitives=", ".join(shown.primitives),
        size=size(shown.rank, shown.virtual_tokens),
        modules=str(shown.modules or ""),
        parameters=f"{shown.parameters:,}",
        on_disk=decimal(shown.disk_bytes),
        in_memory=decimal(shown.compiled_bytes),
        folder=shown.source,
        sha256=shown.content_hash,
        served=_MERGED_ONLY if shown.merged_only else "",
        merged=merged_copy(shown),
        generation=str(shown.generation),
        running=str(shown.running_requests),
        loaded=f"{shown.load_time:%Y-%m-%d %H:%M:%S} UTC, in {shown.load_seconds:.2f} s"
        if shown.load_time
        else "",
    )
    _add_remarks(table, shown.problems, shown.warnings)
    return table


def nearest_tokens(shown: Adapter) -> Table:
    """The vocabulary's nearest tokens to each virtual token, with their similarity."""
    table = Table("virtual token", "nearest tokens (cosine similarity)", title_justify="left")
    for index, near in enumerate(shown.nearest_tokens):
        table.add_row(
            str(index), Text(", ".join(f"{token.text!r} ({token.similarity:.2f})" for token in near))
        )
    return table


def check_report(report: CheckReport) -> Table:
    """What a folder holds and whether it can be served."""
    share = f"{report.share_of_base:.3%} of the base's {report.base_parameters:,}"
    ranks = ", ".join(f"{rank} on {modules} modules" for rank, modules in report.ranks.items())
    table = _facts(
        folder=str(report.folder),
        fits="yes" if report.fits else "no",
        kind=report.kind,
        primitives=", ".join(report.primitives),
        ranks=ranks,
        virtual_tokens=str(report.virtual_tokens or ""),
        modules=str(report.modules or ""),
        parameters=f"{report.parameters:,} ({share})" if report.parameters else "",
        on_disk=decimal(report.disk_bytes) if report.disk_bytes else "",
        in_memory=decimal(report.compiled_bytes) if report.compiled_bytes else "",
        served=_MERGED_ONLY if report.merged_only else "",
        loads_if="; ".join(report.unchecked),
    )
    _add_remarks(table, report.problems, report.warnings)
    return table


def size(rank: int, virtual_tokens: int) -> str:
    """The measure that a kind is known by."""
    parts = [f"rank {rank}" if rank else "", f"{virtual_tokens} virtual tokens" if virtual_tokens else ""]
    return ", ".join(part for part in parts if part)


def merged(shown: Adapter) -> str:
    """Where its merged copy stands, in a few words."""
    if shown.merged is None:
        return "" if shown.mergeable or shown.state is not AdapterState.READY else "can't be"
    words = ["only", shown.merged.state.lower()] if shown.merged_only else [shown.merged.state.lower()]
    return ", ".join([*words, "pinned"] if shown.merged.pinned else words)


def merged_copy(shown: Adapter) -> str:
    """Everything about its merged copy."""
    copy = shown.merged
    if copy is None:
        return merged(shown)
    parts = [merged(shown)]
    if copy.memory_bytes:
        parts.append(f"{decimal(copy.memory_bytes)} in {copy.dtype}, made in {copy.merge_seconds:.2f} s")
    if copy.problem:
        parts.append(copy.problem)
    if (off := copy.deviation) is not None:
        parts.append(
            f"logits off by {off.mean:.3g} (at most {off.largest:.3g}), {off.greedy_agreement:.1%} of "
            f"{off.positions} greedy tokens the same"
        )
    return "; ".join(parts)


def _facts(**facts: str) -> Table:
    """Two columns; what is empty is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts.items():
        if value:
            table.add_row(name.replace("_", " "), Text(value))
    return table


def _add_remarks(table: Table, problems: Sequence[str], warnings: Sequence[str]) -> None:
    for title, texts, style in (("problem", problems, "red"), ("warning", warnings, "yellow")):
        for text in texts[:SHOWN_REMARKS]:
            table.add_row(title, Text(text, style))
        if len(texts) > SHOWN_REMARKS:
            table.add_row("", f"and {len(texts) - SHOWN_REMARKS} more; --json shows them")
