"""A folder inside a store, opened once: every file is read from that folder and never from outside the store.

Stores change while they are read: git-sync and Kubernetes swap a link to a whole new tree, and anyone with
write access may replace a file with a link that leads out. Checking a path says nothing about what is opened
under it a moment later. So a path is resolved first and then opened component by component from the store's
descriptor, following no link: either what was checked is read, or nothing is.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # doesn't wait for a pipe's writer
_FOLDER = getattr(os, "O_DIRECTORY", 0)


class OutsideStore(Exception):
    """A path leads out of the store."""


class FolderChanged(Exception):
    """Something changed while it was being read; another attempt may succeed."""


class FileUnreadable(Exception):
    """A file can't be read; the message is a sentence that begins with its name."""


class OpenFolder:
    """A folder's files.

    Args:
        root: descriptor of the store; `root_path` is its path without links.
        folder: descriptor of the folder; `path` is its path without links.
    """

    def __init__(self, root: int, root_path: Path, folder: int, path: Path) -> None:
        self._root = root
        self._root_path = root_path
        self._folder = folder
        self._path = path
        self._seen: dict[str, tuple[int, ...]] = {}

    def has(self, file: str) -> bool:
        """Whether there is anything of that name, even a dangling link."""
        return _has(self._folder, file)

    def folders_with(self, file: str, depth: int = 2) -> list[str]:
        """Sub-folders, up to `depth` levels down, that hold a file.

        Looks at no more than 100 entries of each, and follows no links.
        """
        found: list[str] = []

        def search(descriptor: int, path: str, left: int) -> None:
            with os.scandir(descriptor) as entries:
                names = sorted(
                    e.name for e in itertools.islice(entries, 100) if e.is_dir(follow_symlinks=False)
                )
            for name in names:
                try:
                    below = os.open(name, _FLAGS | _FOLDER, dir_fd=descriptor)
                except OSError:
                    continue
                try:
                    if _has(below, file):
                        found.append(path + name)
                    elif left > 1:
                        search(below, f"{path}{name}/", left - 1)
                finally:
                    os.close(below)

        try:
            search(self._folder, "", depth)
        except OSError:
            return []
        return found

    def size(self, file: str) -> int:
        """Bytes of a file; 0 if it can't be opened, since reading it will report that."""
        try:
            with self._open(file) as descriptor:
                return os.fstat(descriptor).st_size
        except (OSError, FileUnreadable, FolderChanged, OutsideStore):
            return 0

    def read(self, file: str, max_bytes: int) -> bytes:
        """A file's content.

        Raises:
            FileUnreadable: it isn't a regular file, or has more than `max_bytes`.
            OutsideStore, FolderChanged.
        """
        try:
            with self._open(file) as descriptor:
                before = os.fstat(descriptor)
                content = read_descriptor(descriptor, file, max_bytes)
                if _mark(before) != _mark(os.fstat(descriptor)):
                    raise FolderChanged
                self._seen[file] = _mark(before)
                return content
        except FileNotFoundError:
            raise FileUnreadable(f"{file} is missing") from None
        except OSError as error:
            raise FileUnreadable(f"{file} can't be read: {error.strerror}") from None

    def check_unchanged(self) -> None:
        """Raise FolderChanged if a file that was read has been replaced or modified."""
        for file, mark in self._seen.items():
            try:
                now = _mark(os.stat(file, dir_fd=self._folder))
            except OSError:
                raise FolderChanged from None
            if now != mark:
                raise FolderChanged

    @contextmanager
    def _open(self, file: str) -> Iterator[int]:
        try:
            descriptor = os.open(file, _FLAGS | _AT_ONCE, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK):  # FreeBSD reports a link as EMLINK
                raise
            target = resolved(self._path / file, self._root_path)
            with _walked(self._root, target.relative_to(self._root_path).parts, _AT_ONCE) as descriptor:
                yield descriptor
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def open_folder(root: Path, source: Sequence[str]) -> Iterator[OpenFolder]:
    """Open a folder of a store.

    Args:
        root: the store as it was given; if it is a link, it is resolved now.
        source: the components of the folder's path below it.

    Raises:
        OutsideStore, FolderChanged.
        FileNotFoundError, NotADirectoryError: there is no such folder; or another OSError.
    """
    root_path = Path(os.path.realpath(root))
    path = resolved(root_path.joinpath(*source), root_path)
    root_descriptor = os.open(root_path, _FLAGS | _FOLDER)
    try:
        with _walked(root_descriptor, path.relative_to(root_path).parts, _FOLDER) as folder:
            if not stat.S_ISDIR(os.fstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            yield OpenFolder(root_descriptor, root_path, folder, path)
    finally:
        os.close(root_descriptor)


def resolved(path: Path, root: Path) -> Path:
    """A path without links. Raises OutsideStore if it isn't below `root`, OSError for a loop of links."""
    try:
        found = Path(os.path.realpath(path))
    except (OSError, ValueError):
        raise OutsideStore from None
    if not found.is_relative_to(root):
        raise OutsideStore
    if os.path.islink(found):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


def read_descriptor(descriptor: int, file: str, max_bytes: int) -> bytes:
    """The content of an open file. Reads no more than the file's size, however it grows meanwhile.

    Raises:
        FileUnreadable: it isn't a regular file, or is too large.
        FolderChanged: its length changed meanwhile.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FileUnreadable(f"{file} is not a file")
    if status.st_size > max_bytes:
        raise FileUnreadable(f"{file} has {status.st_size} bytes, the limit is {max_bytes}")
    with open(descriptor, "rb", closefd=False) as opened:
        content = opened.read(status.st_size + 1)
    if len(content) != status.st_size:
        raise FolderChanged
    return content


@contextmanager
def _walked(start: int, parts: Sequence[str], flags: int) -> Iterator[int]:
    """Open a path without links, component by component.

    Raises:
        FolderChanged: a component is a link now.
        OSError.
    """
    current = os.dup(start)
    try:
        for at, part in enumerate(parts):
            last = at == len(parts) - 1
            try:
                below = os.open(part, _FLAGS | (flags if last else _FOLDER), dir_fd=current)
            except OSError as error:
                # A link in place of a folder gives either error.
                linked = error.errno in (errno.ELOOP, errno.EMLINK) or (
                    error.errno == errno.ENOTDIR and _is_link(part, current)
                )
                if linked:
                    raise FolderChanged from None
                raise
            os.close(current)
            current = below
        yield current
    finally:
        os.close(current)


def _has(folder: int, file: str) -> bool:
    try:
        os.stat(file, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _is_link(part: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _mark(status: os.stat_result) -> tuple[int, ...]:
    """Distinguishes a file's content from another's without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
