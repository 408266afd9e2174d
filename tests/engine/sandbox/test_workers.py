"""Workers answer, or are ended; whoever asks always gets an answer or a reason."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polygraft.engine.sandbox import pool, process
from polygraft.engine.sandbox.frames import BadFrame, Frame, pack, read
from polygraft.engine.sandbox.pool import Workers
from polygraft.engine.sandbox.process import WorkerProcess, WorkerStopped, WorkerTimedOut, WorkerUnavailable
from polygraft.errors import ResourceExhausted

HI = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FOREVER = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
CPU = 0.2


@pytest.fixture(scope="module")
def shared() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.end()


@pytest.fixture
def workers(shared: Workers) -> Workers:
    shared._killed.clear()
    return shared


def text(workers: Workers, source: str = PLAIN, content: str = "hi") -> str:
    answer = workers.render(source, [{"role": "user", "content": content}], {}, 100_000)
    return answer.parts["text"].decode()


@pytest.mark.parametrize("content", ["hi", "", "日本 🙂\0\n", "x" * 50_000])
def test_a_chat_is_rendered(workers: Workers, content: str) -> None:
    assert text(workers, content=content) == f"<user>{content}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (FOREVER, "used more than 0.2 s of CPU time"),
        ("{% if false %}" + "{{ x }}" * 200_000 + "{% endif %}", "used more than 0.2 s of CPU time"),
    ],
    ids=["three-loops", "a-megabyte-to-compile"],
)
def test_what_takes_too_long_is_ended_and_others_go_on(workers: Workers, source: str, why: str) -> None:
    with pytest.raises(WorkerStopped, match=why):
        workers.render(source, HI, {}, 1000, cpu_seconds=CPU)
    assert text(workers) == "<user>hi"


@pytest.mark.parametrize(
    ("source", "failed"),
    [
        ("{{ 'x' * 10**9 }}", "memory"),
        ("{% set l = 'xy' * 10**7 %}{{ [l] * 10**9 }}", "memory"),
        ("{{ 'x' * 1001 }}", "long"),
        ("{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}", "long"),
        ("{{ raise_exception('no\\nmore') }}", "refusal"),
        ("{{ 1 / 0 }}", "fault"),
    ],
)
def test_what_takes_too_much_or_fails_is_said(workers: Workers, source: str, failed: str) -> None:
    answer = workers.render(source, HI, {}, 1000)
    assert answer.header["failed"] == failed
    assert str(answer.header.get("problem", "")).isprintable()
    assert text(workers) == "<user>hi"


def test_a_bad_template_keeps_to_one_lane(workers: Workers) -> None:
    """While one is busy with it, others are rendered, and more of it is refused at once."""
    with pytest.raises(WorkerStopped):
        workers.render(FOREVER, HI, {}, 1000, cpu_seconds=CPU)
    outcome: list[object] = []

    def again() -> None:
        try:
            workers.render(FOREVER, HI, {}, 1000, cpu_seconds=1.0)
        except WorkerStopped as error:
            outcome.append(error)

    thread = threading.Thread(target=again)
    thread.start()
    while workers._users[1] is None:
        time.sleep(0.001)
    for _ in range(5):
        assert text(workers) == "<user>hi"
    with pytest.raises(ResourceExhausted, match="had to be stopped"):
        workers.render(FOREVER, HI, {}, 1000, cpu_seconds=CPU)
    assert not outcome
    thread.join()
    assert outcome
    assert workers._users == [None, None]


def test_a_template_has_one_lane_at_a_time_even_before_it_is_known(workers: Workers) -> None:
    def ask() -> None:
        with pytest.raises((WorkerStopped, ResourceExhausted)):
            workers.render(FOREVER, HI, {}, 1000, 0.6)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not any(workers._users):
        time.sleep(0.001)
    assert text(workers) == "<user>hi"
    assert any(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()


def test_many_threads_get_their_own_answers(workers: Workers) -> None:
    found: dict[int, str] = {}

    def ask(at: int) -> None:
        found[at] = text(workers, PLAIN + f"{{# {at % 3} #}}", str(at))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {at: f"<user>{at}" for at in range(24)}


def test_a_worker_that_hangs_or_dies_is_replaced(workers: Workers) -> None:
    text(workers)
    worker = workers._lanes[0]
    assert worker._process is not None
    first = worker._process.pid
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(WorkerTimedOut, match=r"within 0.2 s"):
        worker.ask(Frame({"kind": "keep", "key": ""}), cpu_seconds=1, seconds=0.2, most_bytes=10)
    assert text(workers) == "<user>hi"
    second = worker._process
    assert second is not None
    assert second.pid != first
    second.kill()
    second.wait()
    assert text(workers) == "<user>hi"


def test_an_answer_that_is_late_isnt_held_against_the_template(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    text(workers)
    running = workers._lanes[0]._process
    assert running is not None
    monkeypatch.setattr(pool, "_SECONDS_PER_CPU_SECOND", 0.1)
    os.kill(running.pid, signal.SIGSTOP)
    with pytest.raises(ResourceExhausted, match="the machine is busy"):
        workers.render(PLAIN, HI, {}, 1000)
    assert not workers._killed
    assert workers._users == [None, None]


def test_files_take_turns(workers: Workers) -> None:
    """However many calls for one file wait, the next free lane is another file's."""
    go_on = threading.Event()

    def ask(key: str) -> None:
        with workers._lane(key):
            go_on.wait()

    threads = [threading.Thread(target=ask, args=(key,)) for key in ("a", "a", "a", "b", "b", "c")]
    with workers._lane("a"):
        with workers._lane("b"):
            for thread in threads:
                thread.start()
            while len(workers._waiting) < len(threads):
                time.sleep(0.001)
        assert workers._users == ["a", "c"]
    go_on.set()
    for thread in threads:
        thread.join()
    assert not workers._waiting


def test_what_no_process_can_be_had_for_is_said(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    worker = WorkerProcess(2**28)
    with monkeypatch.context() as patched:
        patched.setattr(process.subprocess, "Popen", refuse)
        with pytest.raises(WorkerUnavailable, match="temporarily unavailable"):
            worker.ask(Frame({}), cpu_seconds=1, seconds=1, most_bytes=10)
    with monkeypatch.context() as patched:
        patched.setattr(process.sys, "executable", "/nowhere/python")
        with pytest.raises(WorkerUnavailable):
            worker.ask(Frame({}), cpu_seconds=1, seconds=1, most_bytes=10)


def test_an_answer_has_a_limit_and_is_a_frame(workers: Workers) -> None:
    worker = WorkerProcess(2**28)
    question = Frame(
        {"kind": "render", "source": PLAIN, "messages": HI, "variables": {}, "most_characters": 1000}
    )
    with pytest.raises(WorkerStopped, match="can't be read"):
        worker.ask(question, cpu_seconds=1, seconds=20, most_bytes=3)
    assert worker._process is None


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\1",
        b"\0\0\0\2\0\0\0\0{",
        b"\0\0\0\2\0\0\0\0{}",
        b"\0\0\0\2\0\0\0\0[]",
        b"\0\0\0\x0d\0\0\0\1" + b'{"parts": {}}' + b"x",
        b"\0\0\0\x11\0\0\0\1" + b'{"parts":{"a":2}}' + b"x",
        b"\xff\xff\xff\xff\0\0\0\0",
        b"\0\0\0\2\xff\xff\xff\xff{}",
    ],
)
def test_what_is_no_frame(data: bytes) -> None:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    with pytest.raises(BadFrame):
        read(take, 100, 100)


def test_a_worker_has_no_secrets_and_no_files_of_the_server(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYGRAFT_ADMIN_TOKEN", "secret-of-sixteen")
    worker = WorkerProcess(2**28)
    secret = tmp_path / "secret"
    secret.write_text("x")
    with secret.open():
        worker._start()
        assert worker._process is not None
        pid = worker._process.pid
        worker.ask(
            Frame({"kind": "render", "source": "x", "messages": HI, "variables": {}, "most_characters": 10}),
            cpu_seconds=1, seconds=20, most_bytes=100,
        )  # fmt: skip
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        opened = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert str(secret) not in opened
        assert len(opened) <= 4
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size        0" in limits
        assert "Max address space         unlimited" not in limits
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
    worker.end()


def test_it_outlives_signals_for_the_group_and_ends_with_the_server(workers: Workers) -> None:
    text(workers)
    running = workers._lanes[0]._process
    assert running is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(running.pid, number)
    assert text(workers) == "<user>hi"
    assert workers._lanes[0]._process is running
    code = (
        "import os\n"
        "from polygraft.engine.sandbox.pool import Workers\n"
        "workers = Workers()\n"
        f"workers.render({PLAIN!r}, {HI!r}, {{}}, 1000)\n"
        "print(workers._lanes[0]._process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    pid = int(ended.stdout)
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forgotten_pool_leaves_no_process() -> None:
    workers = Workers()
    text(workers)
    running = workers._lanes[0]._process
    assert running is not None
    del workers
    gc.collect()
    assert running.returncode is not None


def test_one_that_has_grown_is_replaced(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Frame({"ends": True})
    worker = WorkerProcess(2**28)
    worker._start()
    monkeypatch.setattr(process, "_exchange", lambda *args: answer)
    assert worker.ask(Frame({}), cpu_seconds=1, seconds=1, most_bytes=1) is answer
    assert worker._process is None


def test_a_frame_comes_out_as_it_went_in() -> None:
    frame = Frame({"a": [1, None, "é\ud800"]}, {"x": b"", "y": b"abc"})
    data = pack(frame)
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    assert read(take, 1000, 1000) == frame
    assert read(take, 1000, 1000) is None


def test_the_memory_of_bad_files_is_bounded(workers: Workers) -> None:
    for at in range(pool._MOST_REMEMBERED + 10):
        workers._note_killed(str(at))
    assert len(workers._killed) == pool._MOST_REMEMBERED
    workers._killed.clear()
