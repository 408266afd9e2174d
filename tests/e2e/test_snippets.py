"""Every fenced block of the documents runs against the real server, or says here why it doesn't.

The server's address is the only text that is replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from polygraft.cli.demo.launcher import Addresses
from tests.docs.documents import ROOT, Snippet, snippets

pytestmark = pytest.mark.real

ADDRESS = "127.0.0.1:50051"
SECONDS = 60.0
NUMBER = re.compile(r"-?\d+\.\d+")
SCRIPTS = Path(sys.executable).parent

_LOG = "lines of a log, whose numbers differ on every machine"
EXEMPT = {
    (
        "README.md",
        "make demo ",
    ): "sets up an environment and runs these tests; tests/cli/test_demo.py has the demo",
    ("CONTRIBUTING.md", "make setup"): "sets up an environment and checks the repository",
    ("CONTRIBUTING.md", ".venv/bin/python -m pytest"): "runs tests",
    ("deploy/README.md", "export POLYGRAFT_ADMIN_TOKEN"): "needs a container engine",
    (
        "adapters/README.md",
        "OMP_NUM_THREADS=2 python -m benchmarks",
    ): "takes minutes and rewrites the document",
    ("adapters/README.md", "python adapters/train.py"): "a synopsis of commands that take minutes to hours",
    (
        "docs/reference/kinds.md",
        "model = PeftModel.from_pretrained(AutoModel",
    ): "needs a folder of transformers 4",
    ("docs/internals/architecture.md", "cli/"): "a table of folders",
    ("docs/guides/operations.md", "threads: 2"): _LOG,
    ("docs/guides/operations.md", "INFO polygraft.server"): _LOG,
    ("docs/guides/operations.md", "INFO polygraft.access"): _LOG,
}
"""Why a snippet isn't run, by its document and how its first line begins."""

FRAGMENTS = {
    ("docs/reference/kinds.md", "config = json.loads("): """
import json
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
folder = Path("tasks")
folder.mkdir()
(folder / "adapter_config.json").write_text('{"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}')
tensors = {"prompt_embeddings": torch.ones(4, 8), "prefix_task_cols": torch.eye(2).reshape(2, 2, 1)}
save_file(tensors, folder / "adapter_model.safetensors")
""",
    ("docs/reference/kinds.md", "model = PeftModel.from_pretrained(base"): """
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
from tests.peft_folders import save_adapter
from tests.tiny import save_tiny_model
tiny = save_tiny_model(Path("base"), "llama")
for seed, name in enumerate("ab"):
    save_adapter(Path(name), tiny, "llama", "lora", seed)
base = AutoModelForCausalLM.from_pretrained(tiny)
""",
}
"""What the text around a fragment of Python supposes, run before it in a folder of its own."""

MADE = {"config = json.loads(": "tasks-1/adapter_model.safetensors", "model = PeftModel": "store/ties-ab"}
"""What a fragment leaves behind."""

RUN = {"python", "sh", "console"}
READ = {"yaml", "promql", "mermaid"}


def _id(snippet: Snippet) -> str:
    return f"{snippet.document}: {snippet.key[1][:50]}"


def _entry(table: dict[tuple[str, str], str], snippet: Snippet) -> tuple[str, str] | None:
    """The table's key for a snippet."""
    document, line = snippet.key
    return next((key for key in table if key[0] == document and line.startswith(key[1])), None)


TUTORIAL = "docs/tutorial/first-adapter.md"
"""Its snippets build on each other: test_tutorial.py runs them."""
ALL = [snippet for snippet in snippets() if snippet.document != TUTORIAL]
LEFT = [snippet for snippet in ALL if not _entry(EXEMPT, snippet)]
WHOLE = [snippet for snippet in LEFT if snippet.language in RUN and not _entry(FRAGMENTS, snippet)]
PARTS = [snippet for snippet in LEFT if _entry(FRAGMENTS, snippet)]


def test_every_snippet_is_run_read_or_exempt() -> None:
    assert [snippet.key for snippet in LEFT if snippet.language not in RUN | READ] == []
    named = {_entry(table, snippet) for table in (EXEMPT, FRAGMENTS) for snippet in ALL}
    assert EXEMPT.keys() | FRAGMENTS.keys() <= named, "named here, but in no document"


@pytest.mark.parametrize("snippet", PARTS, ids=_id)
def test_fragments(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key = _entry(FRAGMENTS, snippet)
    assert key
    exec(FRAGMENTS[key] + snippet.text, {})
    made = next(path for start, path in MADE.items() if key[1].startswith(start))
    assert (tmp_path / made).exists()


@pytest.mark.parametrize("snippet", WHOLE, ids=_id)
def test_runs(snippet: Snippet, real_server: Addresses) -> None:
    if snippet.language == "console":
        for command, expected in sessions(snippet.text):
            same(run(["sh", "-ec", command], real_server), expected)
        return
    program = [sys.executable, "-c"] if snippet.language == "python" else ["sh", "-ec"]
    same(run([*program, snippet.text], real_server), snippet.output)


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language == "yaml"], ids=_id)
def test_yaml_can_be_read(snippet: Snippet) -> None:
    assert isinstance(yaml.safe_load(snippet.text), dict)


def run(command: list[str], server: Addresses) -> str:
    """Run a command in the repository's root and return what it printed."""
    environment = os.environ | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "POLYGRAFT_SERVER": server.grpc,  # the commands' default is the address that the documents name
    }
    done = subprocess.run(
        [part.replace(ADDRESS, server.grpc) for part in command],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=environment,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def sessions(text: str) -> list[tuple[str, str | None]]:
    """Split a console's text into commands, each with the output shown below it; None where none is."""
    found: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found[-1][0][-1].endswith("\\"):
            found[-1][0].append(line)
        else:
            found[-1][1].append(line)
    return [("\n".join(command), "\n".join(output) or None) for command, output in found]


def same(printed: str, expected: str | None) -> None:
    """Compare what was printed with what the document shows; fractions may differ by 5 %.

    The documents' numbers are bfloat16's, the server's of these tests are float32's.
    """
    if expected is None:
        return
    assert NUMBER.sub("#", printed).strip() == NUMBER.sub("#", expected).strip()
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True)
    assert all(float(got) == pytest.approx(float(shown), rel=0.05) for got, shown in pairs), printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$ a\n$ b \\\n  c\nout\n", [("a", None), ("b \\\n  c", "out")]),
        ("$ a\none\ntwo\n", [("a", "one\ntwo")]),
    ],
)
def test_sessions(text: str, expected: list[tuple[str, str | None]]) -> None:
    assert sessions(text) == expected
