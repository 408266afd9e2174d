"""What a start took, stage by stage."""

import re
import threading

import pytest

from polygraft.stages import Stages, reminders


def test_stages_and_the_rest_add_up() -> None:
    now = [10.0]
    stages = Stages(lambda: now[0])
    for stage, seconds in (("libraries", 2.0), ("model", 1.5), ("libraries", 0.5)):
        with stages.timed(stage):
            now[0] += seconds
    now[0] += 0.25
    assert stages.summary() == "4.2 s: libraries 2.5, model 1.5, other 0.2"


def test_reminders_come_until_the_block_ends() -> None:
    said, twice = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            twice.set()

    with reminders("compiling", say, every=0.001):
        assert twice.wait(30)
    assert re.fullmatch(r"still compiling \(\d+ s\)", said[0])
    assert "reminders of compiling" not in {thread.name for thread in threading.enumerate()}


def test_a_short_block_needs_none() -> None:
    with reminders("compiling", lambda text: pytest.fail(text)):
        pass
