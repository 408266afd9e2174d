"""The engine's main loop: commands, steps, and rests in between."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from polygraft.engine.engine import Engine
from polygraft.engine.step_result import StepResult

REST_SECONDS = 1.0
"""How long the engine is idle before jobs run that nobody waits for."""


class EngineLoop:
    """Steps an engine while it has work, and runs posted commands in between.

    `run` belongs to the engine's thread; everything else may be called on any.

    Args:
        hand_over: receives each step's result, on the engine's thread.
    """

    def __init__(self, engine: Engine, hand_over: Callable[[StepResult], None]) -> None:
        self._engine = engine
        self._hand_over = hand_over
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self.turn = 0
        """Counts commands, steps and rests; it doesn't change while one of them goes on."""
        self.resting = True
        """Whether the thread is waiting for work, hasn't started, or has ended."""

    @property
    def idle(self) -> bool:
        """Whether all posted commands have run and no work is left."""
        return not self._inbox and not self._engine.has_work

    def post(self, command: Callable[[], None]) -> None:
        """Run a command before the next step."""
        self._inbox.append(command)
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return after the current command or step."""
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        """Work until `stop`. Raises whatever a command or a step raises; the engine's state is unknown then,
        and it must not be used any further."""
        try:
            while self._turn():
                pass
        finally:
            self.resting = True

    def _turn(self) -> bool:
        # Cleared before anything is read, so that a command posted meanwhile wakes the thread again.
        self._wake.clear()
        if self._stopping:
            return False
        self.resting = False
        while self._inbox:
            self.turn += 1
            self._inbox.popleft()()
        self.turn += 1
        if self._engine.has_work:
            self._tell(self._engine.step())
            return True
        self._tell(self._engine.take_news(StepResult()))
        rest = REST_SECONDS if self._engine.background.resting else None
        self.resting = True
        if not self._wake.wait(rest):
            self._engine.background.wake_resting()
        return True

    def _tell(self, result: StepResult) -> None:
        if result.tells_anything:
            self._hand_over(result)
