"""The demo: its parts, and all of it against a stand-in server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from polygraft.cli.demo import command, launcher
from polygraft.cli.demo.burst import ANY_PROMPT, Ask, Burst, plan, read_prompts, send, with_template
from polygraft.cli.demo.display import TokenDisplay
from polygraft.cli.demo.launcher import Addresses, ServerFailed, ServerProcess, parse_ready, serve_command
from polygraft.cli.demo.report import lines, sharing, shown, side_by_side
from polygraft.cli.demo.scrape import Scrape, parse
from polygraft.errors import ConfigError
from polygraft_api.v1 import inference_pb2
from polygraft_client import AsyncClient, FinishReason, Generation, LoraPath, Timings, Usage
from polygraft_client._responses import adapter_from, model_from
from tests.client.scripted import ScriptedServer, adapter

from .conftest import Invoke

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


def generation(text: str, reason: FinishReason = FinishReason.STOP, first: float = 0.5) -> Generation:
    return Generation(
        text=text,
        token_ids=(),
        finish_reason=reason,
        usage=Usage(5, 0, 0, 20),
        timings=Timings(0.1, 0.4, first, 2.0),
        seed=1,
        adapter_generation=0,
        lora_path=LoraPath.UNMERGED,
        stop_sequence="",
        stop_token_id=None,
        preemptions=0,
        request_id="r",
    )


def drawn(*renderables: object) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(*renderables)
    return out.getvalue()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "polygraft ready: grpc=127.0.0.1:43121 metrics=127.0.0.1:38123\n",
            Addresses("127.0.0.1:43121", "127.0.0.1:38123"),
        ),
        ("polygraft ready: grpc=[::1]:1\n", Addresses("[::1]:1", "")),
        ("polygraft ready: soon\n", None),
        ("INFO polygraft ready: grpc=127.0.0.1:1\n", None),
        ("", None),
    ],
)
def test_ready_line(line: str, expected: Addresses | None) -> None:
    assert parse_ready(line) == expected


def test_serve_command_chooses_free_ports() -> None:
    shown = " ".join(serve_command("--model", "default"))
    assert "-m polygraft serve --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --model default" in shown


def test_metrics() -> None:
    text = (
        "# TYPE polygraft_widest_step_adapters gauge\n"
        'polygraft_widest_step_adapters{kind="lora"} 2.0\n'
        'polygraft_widest_step_adapters{kind="base"} 1.0\n'
        "# TYPE process_resident_memory_bytes gauge\n"
        "process_resident_memory_bytes 7.5e+08\n"
    )
    assert parse(text) == Scrape({"lora": 2, "base": 1}, 750_000_000)
    assert parse("") == Scrape({}, 0)


def test_every_adapter_is_asked_and_the_base_each_prompt_once() -> None:
    adapters = [adapter_from(adapter(name)) for name in ("a", "b", "c")]
    asks = plan(adapters, {"a": ["one", "two"], "b": ["two"], "elsewhere": ["three"]})
    assert [(ask.adapter, ask.prompt) for ask in asks] == [
        ("a", "one"),
        ("a", "two"),
        ("b", "two"),
        ("c", ANY_PROMPT),
        ("", "one"),
        ("", "two"),
        ("", ANY_PROMPT),
    ]
    assert {ask.stream for ask in asks} == {True, False}


@pytest.mark.parametrize("text", ["{", "3", '["a"]', '[{"adapter": "a"}]'])
def test_broken_prompts_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"demo\.json"):
        read_prompts(tmp_path / "demo.json")


def test_answers_side_by_side() -> None:
    asks = (Ask("shout", "lora", "Hi [b]", True), Ask("", "", "Hi [b]", False))
    burst = Burst(asks, (generation("LOUD"), generation("quiet", FinishReason.LENGTH)), 2.0)
    lines = [line.split() for line in drawn(side_by_side(burst)).splitlines() if line.strip()]
    assert lines == [["“Hi", "[b]”"], ["base", "model", "quiet", "…"], ["shout", "lora", "LOUD"]]


def test_answers_fit_a_terminal() -> None:
    asks = (Ask("ticket-bottleneck", "prompt_tuning", "word " * 40, True), Ask("", "", "word " * 40, False))
    burst = Burst(asks, (generation("answer " * 30), generation("answer " * 30)), 2.0)
    out = io.StringIO()
    Console(file=out, width=80).print(side_by_side(burst))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert out.getvalue().count("answer") == 60
    assert out.getvalue().count("word") == 40


def test_figures() -> None:
    asks = (Ask("a", "lora", "x", True), Ask("b", "lora", "x", True), Ask("", "", "x", False))
    answers = tuple(generation("t", first=first) for first in (0.1, 0.3, 0.9))
    model = model_from(inference_pb2.GetModelResponse(weight_bytes=270_000_000))
    scraped = Scrape({"lora": 2, "base": 1}, 600_000_000)
    said = list(lines(Burst(asks, answers, 4.0), scraped, model))
    assert said == [
        "Sharing: one step served 2 distinct adapters (2 lora) and the base model together.",
        "Speed: 3 requests, 60 tokens in 4.0 s (15 tokens/s); median time to first token 300 ms.",
        "Memory: the whole server takes 600.0 MB; the weights alone of 3 models, one for each adapter and "
        "the base, would take 810.0 MB.",
    ]


def test_sharing() -> None:
    assert (
        sharing({"p_tuning": 1, "lora": 3})
        == "one step served 4 distinct adapters (3 lora, 1 p_tuning) together"
    )
    assert sharing({}) == "one step served 0 distinct adapters (none) together"


def test_whitespace_around_an_answer_is_not_shown() -> None:
    assert shown(generation("\n yes \n")) == "yes"


def test_display_counts_tokens() -> None:
    out = io.StringIO()
    asks = (Ask("a", "lora", "x", True), Ask("", "", "x", False))
    with TokenDisplay(asks, 48, Console(file=out, width=120)) as display:
        display.on_tokens(0, 7, False)
        display.on_tokens(0, 9, True)
        display.on_tokens(1, 11, True)
    shown = out.getvalue()
    assert "a (lora)" in shown
    assert "9 tokens" in shown
    assert "11 tokens" in shown


async def test_each_is_asked_as_its_template_allows() -> None:
    with ScriptedServer() as server:
        server.script.has_chat_template, server.script.with_template = False, {"mood"}
        asks = plan(map(adapter_from, server.script.adapters), {})
        async with AsyncClient(server.address) as client:
            chats = await with_template(client, [a async for a in client.adapters.list()])
            await send(client, asks, max_new_tokens=4, chats=chats, on_tokens=lambda *_: None)
        asked = [request for request in server.script.requests if hasattr(request, "sampling")]
    assert {request.adapter: request.WhichOneof("input") for request in asked} == {
        "": "prompt",
        "headline": "prompt",
        "mood": "chat",
    }


@pytest.fixture
def store(tmp_path: Path) -> Path:
    prompts = [{"adapter": "headline", "prompt": "A dog won."}, {"adapter": "mood", "prompt": "I like it."}]
    (tmp_path / "demo.json").write_text(json.dumps(prompts))
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Make the demo start the stand-in server, in a given manner; returns the processes it started."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE_SERVER.parents[2]))
    started: list[ServerProcess] = []

    class Remembered(ServerProcess):
        def __enter__(self):
            started.append(self)
            return super().__enter__()

    def use(manner: str) -> list[ServerProcess]:
        monkeypatch.setattr(command, "ServerProcess", Remembered)
        monkeypatch.setattr(
            command, "serve_command", lambda *flags: [sys.executable, str(FAKE_SERVER), manner]
        )
        return started

    return use


def gone(process: ServerProcess) -> bool:
    return process._process.poll() is not None


def test_demo(invoke: Invoke, store: Path, fake) -> None:
    started = fake("")
    result = invoke("demo", "--model", "elsewhere", "--adapters", store)
    assert (result.exit_code, result.stderr) == (0, "")
    for part in (
        "HEADLINE one two three",
        "MOOD one two three",
        "A dog won.",
        "4 requests at once, 2 of them",
    ):
        assert part in result.stdout
    assert "one step served 2 distinct adapters (1 lora, 1 p_tuning) and the base model" in result.stdout
    assert "the whole server takes 700.0 MB" in result.stdout
    assert gone(started[0])
    assert started[0].log[-1] == "drained"


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("crash", "error: the server ended with status 2 before it was ready"),
        ("fails-to-stop", "error: the server ended when asked to stop, with status 4"),
        ("failed-adapter", "error: 1 of 3 adapters can't be served: bad; FAILED; it is cut short"),
    ],
)
def test_demo_fails_with_the_servers_last_lines(
    invoke: Invoke, store: Path, fake, manner: str, says: str
) -> None:
    started = fake(manner)
    result = invoke("demo", "--model", "elsewhere", "--adapters", store)
    assert result.exit_code == 1
    assert "loading the base model" in result.stderr
    assert result.stderr.splitlines()[-1] == says
    assert gone(started[0])


def test_a_server_that_never_gets_ready(fake) -> None:
    idle = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(ServerFailed, match="wasn't ready after"), ServerProcess(idle) as process:
        process.wait_ready(0.1, lambda line: None)
    assert gone(process)


def test_a_server_that_ignores_sigterm_is_killed(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("")
    monkeypatch.setattr(launcher, "STOP_SECONDS", 0.2)
    with ServerProcess([sys.executable, str(FAKE_SERVER), "stubborn"]) as process:
        process.wait_ready(60, lambda line: None)
        with pytest.raises(ServerFailed, match="status -9"):
            process.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(process._process.pid, 0)


def test_a_server_that_ended_by_itself(fake) -> None:
    with ServerProcess([sys.executable, "-c", "pass"]) as process:
        process._process.wait()
        with pytest.raises(ServerFailed, match="ended by itself, with status 0"):
            process.stop()


def test_sigterm_ends_the_demo_and_its_server(store: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from polygraft.cli.demo import command;"
        f"command.serve_command = lambda *flags: [sys.executable, {str(FAKE_SERVER)!r}, 'held'];"
        "from polygraft.cli.app import app;"
        f"app(['demo', '--model', 'elsewhere', '--adapters', {str(store)!r}])"
    )
    pid_file = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(FAKE_SERVER.parents[2]), "FAKE_SERVER_PID": str(pid_file)}
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert any("requests at once" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
