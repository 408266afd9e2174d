"""What is compared: mixes of adapters, concurrencies and paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from polygraft.cli.bench.plan import BASE, Choice, Load
from polygraft_client import Adapter, LoraPath


class Path(StrEnum):
    """A way to serve a request; BASE is the model without an adapter."""

    BASE = "base"
    UNMERGED = "unmerged"
    MERGED = "merged"
    AUTO = "auto"

    @property
    def lora_path(self) -> LoraPath | None:
        """What a request asks for."""
        return None if self is Path.BASE else LoraPath(self.value.upper())


@dataclass(frozen=True, slots=True)
class Mix:
    """Adapters that share the load; of several, the n-th is asked 1/n times as often under Zipf."""

    name: str
    adapters: tuple[str, ...]
    choice: Choice = Choice.UNIFORM


@dataclass(frozen=True, slots=True)
class Cell:
    """One mix at one concurrency, which all paths are measured at."""

    mix: Mix
    concurrency: int

    def load(self, path: Path, prompt_tokens: int, new_tokens: int, vocabulary_size: int, seed: int) -> Load:
        """The load on one path. Each has prompts of its own: the same ones would be found in the prefix
        cache, which paths share where they end up on the same weights."""
        own = seed * len(Path) + list(Path).index(path)
        return Load(
            [BASE] if path is Path.BASE else self.mix.adapters,
            self.mix.choice,
            1.0,
            prompt_tokens,
            new_tokens,
            0,
            None,
            vocabulary_size,
            own,
            path.lora_path,
        )


ZIPF = 32


def comparable(adapters: Sequence[Adapter]) -> list[str]:
    """Names of those that run on both paths, the ones of the most common rank first: mixes must differ in the
    number of adapters and in nothing else."""
    able = [a for a in adapters if a.state == "READY" and a.mergeable and not a.merged_only]
    common = Counter(adapter.rank for adapter in able)
    return [a.name for a in sorted(able, key=lambda a: (-common[a.rank], a.rank, a.name))]


def mixes(names: Sequence[str], sizes: Sequence[int], *, zipf: bool) -> list[Mix]:
    """Mixes of so many adapters as there are enough for, and Zipf over up to 32."""
    found = [Mix(str(size), tuple(names[:size])) for size in sizes if size <= len(names)]
    several = names[:ZIPF]
    if zipf and len(several) > max((len(mix.adapters) for mix in found), default=0):
        found.append(Mix(f"zipf {len(several)}", tuple(several), Choice.ZIPF))
    return found
