"""A live count of each request's tokens; on anything but a terminal it prints once, at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from polygraft.cli.demo.burst import BASE, Ask


class TokenDisplay:
    """One line for each request while the context lasts.

    Args:
        asks: the requests, in the order of their indices.
        max_new_tokens: where the bars end.
        console: where to show them.
    """

    def __init__(self, asks: Sequence[Ask], max_new_tokens: int, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(16),
            TextColumn("{task.fields[tokens]}", justify="right"),
            console=console,
        )
        width = max((len(_label(ask)) for ask in asks), default=0)
        self._tasks = [
            # a request that doesn't stream shows nothing until it is answered: its bar only pulses
            self._progress.add_task(
                _label(ask).ljust(width), total=max_new_tokens if ask.stream else None, tokens="waiting"
            )
            for ask in asks
        ]

    def on_tokens(self, index: int, tokens: int, done: bool) -> None:
        """Show how many tokens a request has so far."""
        task = self._tasks[index]
        if done:
            self._progress.update(task, total=tokens)
        self._progress.update(task, completed=tokens, tokens=f"{tokens} tokens")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def _label(ask: Ask) -> str:
    name = "base model" if ask.adapter == BASE else f"{ask.adapter} ({ask.kind})"
    return name if ask.stream else f"{name}, in one piece"
