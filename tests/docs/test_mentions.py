"""Commands, flags, make targets, metrics, variables, files and links that the documents name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from polygraft.cli.app import app
from polygraft.config import ServerConfig
from polygraft.telemetry.metrics import Metrics

from .documents import DOCUMENTS, ROOT, anchors, code_spans, links

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ROOTS = (ROOT, ROOT / "server" / "polygraft")
OTHER_VARIABLES = {
    "POLYGRAFT_CACHE",  # of core/cache_dir.py
    "POLYGRAFT_SERVER",  # of the commands that call a server
}
NO_COMMANDS = ("polygraft ready: ", "polygraft serve | ", "polygraft adapters …")
"""How code begins that is no command: a line of output, and lists of commands."""
FILE = re.compile(r"[\w.-]+(/[\w.-]+)+/?")
NO_FILES = ("build/", ".venv/", "HuggingFaceTB/", "unsloth/")
"""How paths begin that aren't in a clone: what targets make, and models on the hub."""


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Each command with its flags."""
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}
    if path == ("serve",):
        names = {name.replace("_", "-") for name in ServerConfig.model_fields}
        flags |= {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
        flags |= {"--config", "--print-config"}
    yield path, flags
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def wrong_command(code: str) -> str | None:
    """What is wrong with the command in `code`, which begins with `polygraft`."""
    path: tuple[str, ...] = ()
    words = code.split()[1:]
    while words and (*path, words[0]) in COMMANDS:
        path = (*path, words.pop(0))
    if not path or (path == ("adapters",) and words):
        return f"no such command: {code}"
    unknown = set(FLAG.findall(" ".join(words))) - COMMANDS[path]
    return f"{sorted(unknown)} of: {code}" if unknown else None


def scripts_flags() -> set[str]:
    """Flags of the repository's own scripts, which documents name as well."""
    folders = ("adapters", "benchmarks", "tests/attacks")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return set(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", "".join(sources))) | {"--no-peft"}


def metrics_names() -> set[str]:
    """The names that the server exports, as a scrape shows them."""
    return {sample for family in Metrics().registry.collect() for sample in _forms(family.name)}


def _forms(name: str) -> list[str]:
    return [name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")]


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("polygraft adapters check FOLDER --json", True),
        ("polygraft serve --max-step-ms 3", True),
        ("polygraft adapters chek FOLDER", False),
        ("polygraft serve --max-stepms 3", False),
        ("polygraft score --max-step-ms 3", False),
        ("polygraft", False),
    ],
)
def test_wrong_commands_are_found(code: str, right: bool) -> None:
    assert (wrong_command(code) is None) is right


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str) -> None:
    spans = [s for s in code_spans(document) if s.startswith("polygraft ") and not s.startswith(NO_COMMANDS)]
    assert [wrong for code in spans if (wrong := wrong_command(code))] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags(document: str) -> None:
    known = set().union(*COMMANDS.values()) | scripts_flags()
    spans = " ".join(code_spans(document))
    assert sorted(set(FLAG.findall(spans)) - known) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets(document: str) -> None:
    named = {code.split()[1] for code in code_spans(document) if code.startswith("make ")}
    assert sorted(named - TARGETS) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_variables(document: str) -> None:
    named = {
        name for code in code_spans(document) for name in re.findall(r"\bPOLYGRAFT_[A-Z_]*[A-Z]\b", code)
    }
    settings = {f"POLYGRAFT_{name.upper()}" for name in ServerConfig.model_fields}
    composed = set(re.findall(r"POLYGRAFT_[A-Z_]+", (ROOT / "deploy" / "compose.yaml").read_text()))
    assert sorted(named - settings - composed - OTHER_VARIABLES) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_metrics(document: str) -> None:
    named = set(re.findall(r"\bpolygraft_[a-z_]*[a-z]\b", (ROOT / document).read_text(encoding="utf-8")))
    assert sorted(named - metrics_names() - {"polygraft_client", "polygraft_api", "polygraft_types"}) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files(document: str) -> None:
    named = {code for code in code_spans(document) if FILE.fullmatch(code)}
    roots = (*ROOTS, (ROOT / document).parent)
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert sorted(name for name in missing if not name.startswith(NO_FILES)) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    assert [link for link in links(document) if not _leads_somewhere(document, link)] == []


def _leads_somewhere(document: str, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True  # nothing outside is asked
    path, _, anchor = link.partition("#")
    target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
    if not target.exists():
        return False
    return not anchor or anchor in anchors(str(target.relative_to(ROOT)))
