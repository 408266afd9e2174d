"""Virtual environments and files of the peers, made on demand below build/peers and kept."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.adapter_files import write_adapters
from benchmarks.peers.cases import REGISTERED
from benchmarks.peers.catalog import Artifact, Peer
from polygraft.base.default_model import download, extract
from polygraft.base.loader import inspect_without_weights

LAST_LINES = 3


class Unavailable(Exception):
    """A peer can't be installed or prepared; the text says why."""


def python_of(peer: Peer, root: Path) -> Path:
    """The interpreter that runs a peer; peers without requirements use this one."""
    if not peer.requirements:
        return Path(sys.executable)
    return root / peer.name / "venv" / "bin" / "python"


def prepare(peer: Peer, root: Path) -> None:
    """Install a peer and make its files, as far as an earlier call hasn't.

    Raises:
        Unavailable: a step failed.
    """
    folder = root / peer.name
    folder.mkdir(parents=True, exist_ok=True)
    python = python_of(peer, root)
    if peer.requirements:
        _install(peer, folder, python)
    for artifact in peer.artifacts:
        _make(folder / artifact.name, functools.partial(_run_artifact, peer, artifact, python))


def _run_artifact(peer: Peer, artifact: Artifact, python: Path, into: Path) -> None:
    command = [str(python), *(part.replace("{out}", str(into)) for part in artifact.command)]
    _run(command, into.with_suffix(".log"), f"{peer.name}: making {artifact.name}")


def _install(peer: Peer, folder: Path, python: Path) -> None:
    wanted = hashlib.sha256(repr((peer.requirements, peer.unwanted, peer.build)).encode()).hexdigest()
    # Written last: an interrupted installation has no stamp and starts anew.
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder / "venv", ignore_errors=True)
    log = folder / "install.log"
    _run([sys.executable, "-m", "venv", folder / "venv"], log, f"{peer.name}: creating an environment")
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    for requirements in (peer.requirements[:1], peer.requirements):
        what = f"{peer.name}: installing {', '.join(requirements)}"
        _run([*pip, "install", *requirements], log, what, dict(peer.build))
    if peer.unwanted:
        _run([*pip, "uninstall", "--yes", *peer.unwanted], log, f"{peer.name}: removing what it can't use")
    stamp.write_text(wanted)


def adapters(root: Path) -> Path:
    """The store of random adapters."""
    base = inspect_without_weights("default")
    return _make(root / "adapters", lambda into: write_adapters(into, base, REGISTERED))


def gguf(root: Path) -> Path:
    """The file that the default model was made of."""

    def fetch(into: Path) -> None:
        into.mkdir()
        extract(download(into), into).rename(into / "base.gguf")

    return _make(root / "gguf", fetch) / "base.gguf"


def versions(peer: Peer, root: Path) -> dict[str, str]:
    """Installed versions of a peer's packages."""
    command: list[str | Path] = [
        python_of(peer, root),
        "-m",
        "pip",
        "list",
        "--format=json",
        "--disable-pip-version-check",
    ]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    installed = {package["name"].lower().replace("_", "-"): package["version"] for package in listed}
    return {name: installed[name] for name in peer.packages if name in installed}


def last_words(log: Path) -> str:
    """The end of a log, for telling why something failed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])


def _make(target: Path, write: Callable[[Path], None]) -> Path:
    """Make a folder whole or not at all."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(target)
    return target


def _run(
    command: Sequence[str | Path], log: Path, what: str, variables: dict[str, str] | None = None
) -> None:
    print(f"{what} (log: {log})", flush=True)
    with log.open("ab") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (variables or {}), check=False
        )
    if done.returncode:
        raise Unavailable(f"{what}: status {done.returncode}: {last_words(log)}")
