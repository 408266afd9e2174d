"""The store: nothing outside it is read, and nothing of two trees at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polygraft.adapters.files import open_folder as open_folder_module
from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.adapters.files.open_folder import OpenFolder
from polygraft.adapters.files.store import AdapterStore
from polygraft.base.tokenizer import TOKENIZER
from polygraft.errors import AdapterInvalid, ConfigError, InvalidRequest, PolygraftError
from tests.adapters.specimen import Specimen
from tests.engine.stores import strengthen

ROOM = 2**30


@pytest.fixture
def intact(specimen: Callable[[str], Specimen], tmp_path: Path) -> Path:
    return specimen("lora").save(tmp_path / "store" / "one")


@pytest.mark.parametrize(
    "source",
    ["", ".", "./", "..", "../outside", "one/../../outside", "one/..", "/", "/etc", "a\0b", "\0"],
)
def test_sources_that_lead_out_of_the_store(intact: Path, source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"source: must be a folder below the store") as caught:
        AdapterStore(intact.parent, ROOM).read("one", source)
    assert caught.value.field == "source"


@pytest.mark.parametrize(("source", "near"), [("ONE", "; did you mean 'one'?"), ("nothing-alike", "")])
def test_an_unknown_folder_names_the_nearest(intact: Path, source: str, near: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        AdapterStore(intact.parent, ROOM).read("new", source)
    assert caught.value.problems == (f"no such folder in the store: {source}{near}",)


def test_a_server_without_a_store(intact: Path) -> None:
    store = AdapterStore(None, ROOM)
    assert store.names() == []
    with pytest.raises(InvalidRequest, match=r"source: this server has no store"):
        store.read("one", "one")


@pytest.mark.parametrize("source", ["nothing", "one/deeper", "x" * 5000, "one/adapter_config.json"])
def test_sources_that_are_no_folder(intact: Path, source: str) -> None:
    with pytest.raises(PolygraftError) as caught:
        AdapterStore(intact.parent, ROOM).read("one", source)
    assert isinstance(caught.value, AdapterInvalid | InvalidRequest)
    assert source[:50] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("what", ["folder", "deep folder", CONFIG, WEIGHTS])
def test_symlinks_out_of_the_store(intact: Path, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(intact, outside)
    store = AdapterStore(intact.parent, ROOM)
    source = "one"
    if what == "folder":
        (intact.parent / "link").symlink_to(outside)
        source = "link"
    elif what == "deep folder":
        (intact / "deep").symlink_to(tmp_path)
        source = "one/deep/outside"
    else:
        (intact / what).unlink()
        (intact / what).symlink_to(outside / what)
    with pytest.raises(InvalidRequest, match=rf"source: leads out of the store: '{source}'"):
        store.read("one", source)


def test_a_symlink_to_itself(intact: Path) -> None:
    (intact.parent / "loop").symlink_to("loop")
    with pytest.raises(PolygraftError) as caught:
        AdapterStore(intact.parent, ROOM).read("loop", "loop")
    assert isinstance(caught.value, AdapterInvalid | InvalidRequest)
    assert "loop" in str(caught.value)


def test_symlinks_inside_the_store_are_fine(intact: Path) -> None:
    (intact.parent / "same").symlink_to(intact)
    store = AdapterStore(intact.parent, ROOM)
    assert store.read("x", "same").content_hash == store.read("x", "one").content_hash
    assert store.names() == ["one", "same"]


def test_a_store_behind_a_symlink_is_fine(intact: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(intact.parent)
    assert AdapterStore(tmp_path / "alias", ROOM).read("x", "one").name == "x"


def test_names_are_those_of_visible_folders(intact: Path) -> None:
    for name in (".hidden", "__pycache__", "deep"):
        (intact.parent / name).mkdir()
    (intact.parent / "README.md").write_text("text")
    assert AdapterStore(intact.parent, ROOM).names() == ["deep", "one"]


def test_a_store_that_cant_be_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--adapters: .* can't be listed: No such file"):
        AdapterStore(tmp_path / "gone", ROOM).names()


HOSTILE = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["..", ".", "", "one", "out", "in", "~", "\\", "\0", "a" * 300]), max_size=6
    ).map("/".join),
)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells from /proc what was opened")
@given(source=HOSTILE)
@example(source="out/two")
@example(source="in")
@example(source="one/out")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_source_nothing_outside_the_store_is_opened(intact: Path, source: str) -> None:
    root = intact.parent
    outside = root.parent / "outside"
    if not outside.exists():
        shutil.copytree(intact, outside / "two")
        (root / "out").symlink_to(outside)
        (root / "in").symlink_to(intact)
        (intact / "out").symlink_to(outside / "two")
    opened: list[Path] = []
    real = os.open

    def note(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real(path, *args, **kwargs)
        opened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", note)
        try:
            AdapterStore(root, ROOM).read("any", source)
        except (AdapterInvalid, InvalidRequest):
            pass
        else:
            assert opened, "it was read some other way"
    assert all(path.resolve().is_relative_to(root.resolve()) for path in opened)


# ---- a store that changes --------------------------------------------------------------------------------


def lead(link: Path, to: str) -> None:
    """Lead a link elsewhere at once, as git-sync and Kubernetes do."""
    new = link.with_name("new-link")
    new.symlink_to(to)
    new.replace(link)


@pytest.fixture
def revisions(intact: Path, tmp_path: Path) -> Path:
    """A link to the first of two trees with an adapter each."""
    shutil.copytree(intact, tmp_path / "git" / "rev-1" / "one")
    shutil.copytree(intact, tmp_path / "git" / "rev-2" / "one")
    strengthen(tmp_path / "git" / "rev-2" / "one")
    shutil.copytree(intact, tmp_path / "git" / "rev-2" / "two")
    link = tmp_path / "git" / "current"
    link.symlink_to("rev-1")
    return link


def at_the_second_read(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], *, again: bool = False
) -> None:
    """Do something when a folder's second file is about to be read."""
    read, reads = OpenFolder.read, []

    def acting(folder: OpenFolder, file: str, max_bytes: int) -> bytes:
        reads.append(file)
        if file == WEIGHTS and (again or reads.count(file) == 1):
            act()
        return read(folder, file, max_bytes)

    monkeypatch.setattr(OpenFolder, "read", acting)


def test_a_store_that_is_led_to_another_tree(revisions: Path) -> None:
    store = AdapterStore(revisions, ROOM)
    first = store.read("one", "one").content_hash
    assert store.names() == ["one"]
    lead(revisions, "rev-2")
    shutil.rmtree(revisions.parent / "rev-1")
    assert store.names() == ["one", "two"]
    assert store.read("two", "two").content_hash == first
    assert store.read("one", "one").content_hash != first


def test_a_store_that_is_led_out_of_where_it_was_is_the_new_one(revisions: Path, intact: Path) -> None:
    store = AdapterStore(revisions, ROOM)
    (revisions.parent / "rev-1" / "link").symlink_to(intact)
    with pytest.raises(InvalidRequest, match="leads out"):
        store.read("x", "link")
    lead(revisions, str(intact.parent))
    assert store.read("x", "one").name == "x"


@pytest.mark.parametrize("old_is_gone", [False, True])
def test_a_swap_in_the_middle_mixes_no_two_trees(
    revisions: Path, monkeypatch: pytest.MonkeyPatch, old_is_gone: bool
) -> None:
    store = AdapterStore(revisions, ROOM)
    first = store.read("one", "one").content_hash

    def swap() -> None:
        lead(revisions, "rev-2")
        if old_is_gone:
            shutil.rmtree(revisions.parent / "rev-1")

    at_the_second_read(monkeypatch, swap)
    found = store.read("one", "one").content_hash
    monkeypatch.undo()
    second = store.read("one", "one").content_hash
    assert second != first
    # What was opened is read to its end; what is gone is read anew.
    assert found == (second if old_is_gone else first)


def test_files_that_are_links_into_a_tree_that_is_swapped(
    revisions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Kubernetes mounts a ConfigMap.
    root = revisions.parent
    (root / "mounted").mkdir()
    for file in (CONFIG, WEIGHTS):
        (root / "mounted" / file).symlink_to(f"../current/one/{file}")
    config = root / "rev-2" / "one" / CONFIG
    config.write_text(config.read_text().replace('"r": 4', '"r":  4'))
    store = AdapterStore(root, ROOM)
    first = store.read("m", "mounted").content_hash
    at_the_second_read(monkeypatch, lambda: lead(revisions, "rev-2"))
    found = store.read("m", "mounted").content_hash
    assert found != first
    assert found == store.read("m", "rev-2/one").content_hash


def test_a_folder_that_never_rests(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch() -> None:
        (intact / CONFIG).write_text((intact / CONFIG).read_text() + " ")

    at_the_second_read(monkeypatch, touch, again=True)
    with pytest.raises(AdapterInvalid, match="changes while it is being read"):
        AdapterStore(intact.parent, ROOM).read("one", "one")


@pytest.mark.parametrize("what", ["folder", "file", "tokenizer"])
def test_a_link_that_is_swapped_in_after_the_check_is_not_followed(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    secret = tmp_path / "secret"
    shutil.copytree(intact, secret / "one")
    strengthen(secret / "one")
    (secret / "one" / TOKENIZER).write_text("secret")
    real = intact.parent / "real"
    intact.rename(real)
    if what == "folder":
        intact.symlink_to("real")
    else:
        intact.mkdir()
        for file in (CONFIG, WEIGHTS):
            (intact / file).symlink_to(f"../real/{file}")
        if what == "tokenizer":
            (real / TOKENIZER).write_text("{}")
            (intact / TOKENIZER).symlink_to(f"../real/{TOKENIZER}")
    resolve = open_folder_module.resolved

    def swapping(path: Path, root: Path) -> Path:
        found = resolve(path, root)
        if (
            real.exists()
            and not real.is_symlink()
            and path.name == {"folder": "one", "file": WEIGHTS}.get(what, TOKENIZER)
        ):
            real.rename(tmp_path / "away")
            real.symlink_to(secret / "one")
        return found

    monkeypatch.setattr(open_folder_module, "resolved", swapping)
    with pytest.raises(PolygraftError) as caught:
        AdapterStore(intact.parent, ROOM).read("one", "one")
    assert real.is_symlink()
    assert isinstance(caught.value, AdapterInvalid | InvalidRequest)


def test_more_than_room_was_made_for_is_not_read(intact: Path) -> None:
    store = AdapterStore(intact.parent, ROOM)
    size = store.size("one", "one")
    assert size == sum(file.stat().st_size for file in intact.iterdir())
    store.read("one", "one", size)
    with pytest.raises(AdapterInvalid, match="has grown"):
        store.read("one", "one", size - 1)
