"""Predicts a step's time from earlier steps, and how much of a sequence fits into the next one."""

from __future__ import annotations

from dataclasses import dataclass

from polygraft.core.spec import BaseSpec
from polygraft.engine.sequences.sequence import Sequence

_UP, _DOWN = 0.3, 0.5
"""How far one step's time moves the costs up or down. Less upwards, since other load on the machine makes
steps longer, never shorter."""
_FARTHEST = 4.0
"""Limit of the ratio between a step's time and its expected time, either way."""
_GUESS = 2.0
"""Initial factor on the arithmetic of attention and logits, whose operators are slower per operation than
matrix products."""
_REST = 0.25
"""The share of a step's time limit that prefill always gets, however long decodes take."""
_WORTHWHILE = 4.0
"""A step may always take so many times as long as one without rows; otherwise reading the weights would take
most of the time."""


@dataclass(slots=True)
class Work:
    """What a step computes.

    Args:
        rows: tokens that go through the base.
        keys: tokens that these attend to, summed over the rows.
        logits: rows whose logits are needed.
    """

    rows: int = 0
    keys: int = 0
    logits: int = 0

    def add(self, start: int, count: int, logits: int) -> None:
        """Add `count` tokens of a sequence, from `start` on."""
        self.rows += count
        self.keys += keys_of(start, count)
        self.logits += logits


def keys_of(start: int, count: int) -> int:
    """How many keys `count` tokens of a sequence attend to, from `start` on, themselves included."""
    return count * start + count * (count + 1) // 2


class StepCost:
    """Predicts a step's seconds as a sum of four costs: per step, row, key and row of logits.

    They start in the proportions of the model's arithmetic. Every step then corrects each in proportion to
    its share of the expected time, so they converge to what this machine takes for this model.

    Args:
        key, logits: initial costs relative to a row's.
        limit: seconds that a step should take at most; 0 for no limit.
    """

    def __init__(self, *, key: float, logits: float, limit: float) -> None:
        self._shape = (key * _GUESS, logits * _GUESS)
        self._limit = limit
        self.step = self.row = self.key = self.logits = 0.0
        """Seconds of each; 0 until a step has run."""

    @classmethod
    def of_model(cls, spec: BaseSpec, limit: float) -> StepCost:
        """For a model of this shape."""
        row = sum(s.in_features * s.out_features for s in spec.linears.values() if not s.is_head)
        row += sum(inp * out for e in spec.experts.values() for inp, out in e.weights.values())
        attention = sum(site.heads * (site.head_dim + site.value_dim) for site in spec.attention.values())
        head = spec.hidden_size * spec.vocabulary_size
        return cls(key=attention / max(row, 1), logits=head / max(row, 1), limit=limit)

    @property
    def limit(self) -> float | None:
        """Seconds that a step may take; None for no limit, or until a step has run."""
        if not self._limit or not self.row:
            return None
        return max(self._limit, _WORTHWHILE * self.step)

    def seconds(self, work: Work) -> float:
        """The expected time of a step."""
        return self.step + work.rows * self.row + work.keys * self.key + work.logits * self.logits

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step that took so many seconds."""
        if not work.rows or seconds <= 0:
            return
        if not self.row:
            key, logits = self._shape
            self.step = seconds / 2
            self.row = seconds / 2 / (work.rows + key * work.keys + logits * work.logits)
            self.key, self.logits = self.row * key, self.row * logits
            return
        expected = self.seconds(work)
        ratio = min(max(seconds / expected, 1 / _FARTHEST), _FARTHEST)
        move = (ratio - 1) * (_UP if ratio > 1 else _DOWN) / expected
        self.step *= 1 + move * self.step
        self.row *= 1 + move * work.rows * self.row
        self.key *= 1 + move * work.keys * self.key
        self.logits *= 1 + move * work.logits * self.logits


class StepBudget:
    """The tokens and expected seconds that are left while a step is put together.

    Decodes go first and are never refused. The others get the rest in their order: at least a quarter of the
    step's time limit, and at least one token for the first.

    Args:
        tokens: most tokens of a step.
        cost: None bounds only the tokens.
    """

    def __init__(self, tokens: int, cost: StepCost | None) -> None:
        self.tokens = tokens
        self.work = Work()
        self._cost = cost
        self._seconds: float | None = None
        self._limited = cost is not None and cost.limit is not None

    @property
    def exhausted(self) -> bool:
        """Whether only decodes may still be added."""
        return self.tokens == 0 or (self._seconds is not None and self._seconds <= 0)

    def decode(self, sequence: Sequence) -> None:
        """Add the next token of a sequence that decodes."""
        self.tokens -= 1
        work = self.work
        work.rows += 1
        work.keys += sequence.num_computed + 1
        work.logits += 1

    def fill(self, sequence: Sequence, start: int) -> int:
        """Add as many tokens of a sequence as fit, from `start` on; returns how many, at least 1.

        There must be something left.
        """
        count = min(sequence.num_tokens - start, self.tokens)
        if self._limited:
            count = self._affordable(sequence, start, count)
        self.tokens -= count
        self.work.add(start, count, _logits(sequence, start, count))
        return count

    def give_back(self, count: int) -> None:
        """Return so many added tokens that won't run. Their expected time stays counted in this step."""
        self.tokens += count

    def _affordable(self, sequence: Sequence, start: int, most: int) -> int:
        cost = self._cost
        assert cost is not None
        assert cost.limit is not None
        if self._seconds is None:
            left = cost.limit - cost.seconds(self.work)
            self._seconds = max(left, cost.limit * _REST)

        def takes(count: int) -> float:
            logits = _logits(sequence, start, count)
            return count * cost.row + keys_of(start, count) * cost.key + logits * cost.logits

        count, low = most, 1
        if takes(most) > self._seconds:
            high = most
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if takes(middle) <= self._seconds else (low, middle)
            count = low
        self._seconds -= takes(count)
        return count


def _logits(sequence: Sequence, start: int, count: int) -> int:
    """How many of `count` tokens from `start` on need logits."""
    return max(0, start + count - max(sequence.logits_from, start))
