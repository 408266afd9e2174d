"""What the wheel and the source distribution hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from polygraft.cli.demo.burst import read_prompts
from polygraft.cli.demo.samples import PROMPTS_FILE, sample_adapters

from .conftest import CLONE, NOT_OF_THE_CLONE, Built, Run, links


def files(folder: Path) -> set[str]:
    """Everything below it that belongs to a clone."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and not any(
            Path(part).match(pattern)
            for part in path.relative_to(folder).parts
            for pattern in NOT_OF_THE_CLONE
        )
    }


def test_the_source_distribution_is_the_clone(built: Built) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    assert files(built.source) - made == files(CLONE) - {".gitignore"}


def test_the_wheel_holds_all_modules_and_operators_and_nothing_else(built: Built) -> None:
    packages = {
        "polygraft": "server",
        "polygraft_client": "clients",
        "polygraft_types": "clients",
        "polygraft_api": "protos",
    }
    for package, folder in packages.items():
        own = files(built.site / package)
        assert {name for name in own if not name.startswith("samples/")} == files(CLONE / folder / package)
    top = {path.name for path in built.site.iterdir()}
    assert top == {*packages, "polygraft-0.1.0.dist-info"}
    assert (
        "polygraft = polygraft.cli:main"
        in (built.site / "polygraft-0.1.0.dist-info/entry_points.txt").read_text()
    )


def test_a_clients_wheel_stays_small(built: Built) -> None:
    assert sum(entry.compress_size for entry in built.wheel.infolist()) < 4_000_000


def test_what_the_index_shows_has_no_link_that_leads_nowhere(built: Built) -> None:
    text = built.metadata().partition("\n\n")[2]
    assert text.startswith("# Polygraft")
    assert [target for target in links(text) if not re.match(r"https?://|#", target)] == []
    assert links("[a](docs/a.md) ![b](b.png 'b')\n[c]: c.md") == ["docs/a.md", "b.png", "c.md"]


def test_what_the_index_shows_names_the_ways_to_install(built: Built) -> None:
    for command in ("pip install polygraft`", "'polygraft[cli]'", "'polygraft[server]'"):
        assert command in built.metadata()


def test_the_index_can_sort_it(built: Built) -> None:
    metadata = built.metadata()
    assert "Classifier: Programming Language :: Python :: 3.11" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_wheel_brings_samples_for_the_demo(installed: Callable[..., Run], built: Built) -> None:
    done = installed("cli")(
        "-c", "from polygraft.cli.demo.samples import sample_adapters; print(sample_adapters())"
    )
    folder = Path(done.stdout.strip())
    assert folder.parts[-2:] == ("polygraft", "samples"), done.stderr
    samples = [path for path in folder.iterdir() if path.is_dir()]
    assert len(samples) >= 3
    prompts = read_prompts(folder / PROMPTS_FILE)
    for sample in samples:
        assert prompts[sample.name]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (sample / name).read_bytes() == (CLONE / "adapters" / sample.name / name).read_bytes()


def test_a_clone_serves_all_of_its_samples() -> None:
    assert sample_adapters() == CLONE / "adapters"
