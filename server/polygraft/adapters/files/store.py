"""The folder that the server's adapters come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from polygraft.adapters.files.folder import CONFIG, AdapterFolder, folder_bytes, read_open_folder
from polygraft.adapters.files.open_folder import FolderChanged, OpenFolder, OutsideStore, open_folder
from polygraft.errors import AdapterInvalid, ConfigError, InvalidRequest
from polygraft.near_names import did_you_mean

T = TypeVar("T")
_TRIES = 5
"""How often a folder is read that is being changed."""


class AdapterStore:
    """A folder of adapters' folders, or a single adapter's own. Nothing outside it is ever read.

    It may be a link that is led elsewhere while the server runs, as git-sync does it: where it leads is
    looked up at each call, and what one call reads is from one tree.

    Args:
        root: the folder, or None for a server without one.
        max_bytes: the largest weights file that is read.
    """

    def __init__(self, root: Path | None, max_bytes: int) -> None:
        # Absolute, since the working directory may change, but with its links.
        self._root = None if root is None else Path(os.path.abspath(root))
        self._max_bytes = max_bytes

    @property
    def exists(self) -> bool:
        """Whether the server has a store."""
        return self._root is not None

    @property
    def only(self) -> str | None:
        """The name of the adapter whose own folder this is; None for a folder of adapters."""
        if self._root is not None and (self._root / CONFIG).is_file():
            return self._root.name
        return None

    def names(self) -> list[str]:
        """What may be adapters: sub-folders and links; hidden ones and Python's are none.

        Raises:
            ConfigError: the store can't be listed.
        """
        if self._root is None:
            return []
        if self.only is not None:
            return [self.only]
        try:
            with os.scandir(self._root) as entries:
                return sorted(entry.name for entry in entries if _may_be_adapter(entry))
        except OSError as error:
            raise ConfigError("--adapters", f"{self._root} can't be listed: {error.strerror}") from None

    def size(self, name: str, source: str) -> int:
        """Bytes of the files that `read` would read; it raises as that does."""
        return self._with_folder(name, source, lambda folder: folder_bytes(folder))

    def read(self, name: str, source: str, most: int | None = None) -> AdapterFolder:
        """Read one folder; blocks on the disk.

        Args:
            source: relative to the store.
            most: bytes of all its files, where room was made for so many.

        Raises:
            InvalidRequest: `source` leads out of the store, or there is no store.
            AdapterInvalid: it isn't a folder that can be an adapter's.
        """

        def read(folder: OpenFolder) -> AdapterFolder:
            if most is not None and folder_bytes(folder) > most:
                raise AdapterInvalid(name, ["it has grown since its load began; load it again"])
            found = read_open_folder(name, folder, self._max_bytes)
            folder.check_unchanged()
            return found

        return self._with_folder(name, source, read)

    def _with_folder(self, name: str, source: str, use: Callable[[OpenFolder], T]) -> T:
        if self._root is None:
            raise InvalidRequest("source", "this server has no store (--adapters)")
        relative = PurePosixPath(source)
        if relative.is_absolute() or ".." in relative.parts or "\0" in source or not relative.parts:
            raise InvalidRequest("source", f"must be a folder below the store, got {source[:200]!r}")
        parts = () if source == self.only else relative.parts
        for _ in range(_TRIES):
            was = os.path.realpath(self._root)
            try:
                with open_folder(self._root, parts) as folder:
                    return use(folder)
            except OutsideStore:
                raise InvalidRequest("source", f"leads out of the store: {source[:200]!r}") from None
            except FolderChanged:
                continue
            except AdapterInvalid as error:
                failure = error
            except OSError as error:
                failure = AdapterInvalid(name, [self._why(error, source)])
            # Else it was missing because the tree that it was in is gone, and there is another one.
            if os.path.realpath(self._root) == was:
                raise failure
        raise AdapterInvalid(name, ["it changes while it is being read; load it again when it is complete"])

    def _why(self, error: OSError, source: str) -> str:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            try:
                near = did_you_mean(source[:200], (known for known in self.names() if known != source))
            except ConfigError:  # the store has gone or can't be listed
                near = ""
            return f"no such folder in the store: {source[:200]}{near}"
        return f"the folder can't be opened: {source[:200]}: {error.strerror}"


def _may_be_adapter(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith((".", "_")):
        return False
    leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
    return os.path.isdir(entry.path) or leads_nowhere


def read_folder(name: str, folder: Path, max_bytes: int) -> AdapterFolder:
    """Read a folder as the server would whose store is the folder above it. Raises as `AdapterStore.read`."""
    whole = Path(os.path.abspath(folder))
    return AdapterStore(whole.parent, max_bytes).read(name, whole.name)
