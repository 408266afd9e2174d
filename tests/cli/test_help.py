"""Help, version, and what asking for them must not cost."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer

from polygraft.cli.app import app
from polygraft.cli.settings import settings_command
from polygraft.config import Group, ServerConfig
from polygraft.config_sources import flag, variable

from .conftest import Invoke


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
COMMANDS[("serve",)] = settings_command()


def help_of(invoke: Invoke, words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", COMMANDS)
def test_help_reads_well(
    invoke: Invoke, words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(invoke, words, columns, monkeypatch)
    assert max(map(len, shown.splitlines())) <= columns
    assert not re.search(
        r"<\w|list\[|SecretStr|\bstr\b|\bPath\b|\bTEXT\b(?! )|INTEGER|FLOAT|unknown|…\B-", shown
    )
    flat = " ".join(shown.split())
    for param in COMMANDS[words].params:
        about = " ".join((param.help or "").split()) if hasattr(param, "help") else ""
        assert about in flat, "the text is there as it was written, brackets included"
        for name in (*param.opts, *param.secondary_opts):
            if name.startswith("-"):
                assert re.search(rf"(^|\s){re.escape(name)}(\s|,|$)", shown), f"{name} is cut"
    assert "..." not in shown.partition("Commands:")[2], "a command's summary is cut"
    for option in re.split(r"\n  (?=-)", shown)[1:]:
        assert option.count("default:") <= 1, option


def test_every_setting_is_in_one_group_with_its_default_and_its_variable(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(invoke, ("serve",), 80, monkeypatch)
    groups = dict(re.findall(r"^(\S.*):\n((?:  .*\n)+)", shown, re.MULTILINE))
    assert [name for name in groups if name != "Options"] == list(Group)
    for name in ServerConfig.model_fields:
        (option,) = re.findall(rf"^  {flag(name)}[ \n](?:.*\n)+?(?=  -|\n|\Z)", shown, re.MULTILINE)
        about = " ".join(option.split())
        assert f"[env var: {variable(name)}; default: " in about
        assert "None" not in about


def test_every_choice_that_is_offered_is_taken(invoke: Invoke) -> None:
    for words, command in COMMANDS.items():
        for param in command.params:
            choices = re.fullmatch(r"\[([\w|]+)\]", param.metavar or "")
            for choice in choices[1].split("|") if choices else ():
                result = invoke(*words, param.opts[0], choice, "--no-such-option")
                # The option's name stands behind a colon or in quotes, by typer's version.
                assert result.stderr.startswith("error: No such option"), (words, param.opts, choice)
                assert "--no-such-option" in result.stderr


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["serve", "--max-num-seq", "1"], "--max-num-seqs"),
        (["generate", "--adaptr", "x", "hi"], "--adapter"),
        (["adapters", "lst"], "list"),
        (["serv"], "serve"),
    ],
)
def test_a_mistyped_word_names_the_nearest(invoke: Invoke, words: list[str], nearest: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert nearest in result.stderr


def test_help_never_shows_the_token(invoke: Invoke) -> None:
    for command in (["adapters", "list"], ["serve"]):
        result = invoke(*command, "--help", env={"POLYGRAFT_ADMIN_TOKEN": "very-secret-token"})
        assert "very-secret-token" not in result.output


@pytest.mark.parametrize("command", [[], ["adapters"]])
def test_no_command_shows_the_commands(invoke: Invoke, command: list[str]) -> None:
    result = invoke(*command)
    assert result.exit_code == 2
    assert "Commands" in result.output
    assert "error" not in result.stderr


@pytest.mark.parametrize("words", ["--version", "version"])
def test_version(invoke: Invoke, words: str) -> None:
    assert invoke(words).output == f"{version('polygraft')}\n"


def test_the_command_line_imports_none_of_the_servers_packages() -> None:
    packages = ["torch", "transformers", "pydantic", "pydantic_settings", "numpy"]
    code = f"import sys, polygraft.cli.app; print([name for name in {packages} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_module_is_the_command(invoke: Invoke) -> None:
    command = [sys.executable, "-m", "polygraft", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout == f"{version('polygraft')}\n"
