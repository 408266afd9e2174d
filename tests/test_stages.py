"""What a start took, stage by stage."""

from polygraft.stages import Stages


def test_stages_and_the_rest_add_up() -> None:
    now = [10.0]
    stages = Stages(lambda: now[0])
    for stage, seconds in (("libraries", 2.0), ("model", 1.5), ("libraries", 0.5)):
        with stages.timed(stage):
            now[0] += seconds
    now[0] += 0.25
    assert stages.summary() == "4.2 s: libraries 2.5, model 1.5, other 0.2"
