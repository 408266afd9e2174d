"""What a step brings, for whoever called it."""

from __future__ import annotations

from dataclasses import dataclass, field

from polygraft.core.output import RequestOutput
from polygraft.engine.client import Occupancy, StepStats
from polygraft.engine.events import Events
from polygraft.engine.schedule.scheduler import Batch
from polygraft_types.requests import LoraPath


@dataclass(slots=True)
class StepResult:
    """What one step brought.

    Args:
        stats: None if nothing ran through the base.
        occupancy: None if it is as before.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    stats: StepStats | None = None
    occupancy: Occupancy | None = None
    events: Events = field(default_factory=list)

    @property
    def tells_anything(self) -> bool:
        """Whether there is anything in it."""
        return self != StepResult()


def step_stats(batch: Batch, seconds: float, *, switched: bool) -> StepStats:
    """What a batch was.

    Args:
        seconds: schedule, run and postprocess together.
        switched: whether it ran on other weights than the one before.
    """
    decodes = sum(i.count for i in batch.items if i.sequence.decodes_from(i.start))
    adapters = {
        (adapter.name, adapter.compiled.kind): None
        for i in batch.items
        for adapter in i.sequence.stack.adapters
    }
    return StepStats(
        seconds=seconds,
        path=(LoraPath.UNMERGED if batch.copy is None else LoraPath.MERGED).value,
        prefill_rows=batch.rows - decodes,
        decode_rows=decodes,
        adapters=tuple(adapters),
        base_rows=any(not i.sequence.stack.adapters for i in batch.items),
        preemptions=batch.preempted,
        waited=batch.waited,
        switched=switched,
    )
