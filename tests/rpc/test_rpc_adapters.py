from __future__ import annotations

import base64
from typing import Any

import grpc
import pytest

from polygraft_api.v1 import adapters_pb2 as pb
from polygraft_api.v1.inference_pb2 import GenerateRequest
from polygraft_types.adapters import AdapterInfo, AdapterState, MergedInfo, MergeState
from tests.rpc.conftest import Serve, Served, details_of
from tests.rpc.fake_engine import ready

TOKEN = "correct-horse-battery"


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_load_unload_reload(served: Served) -> None:
    loaded = await served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="new", source="some/folder"))
    assert (loaded.adapter.name, loaded.adapter.generation) == ("new", 9)
    assert served.engine.loads == [("new", "some/folder")]
    again = await served.adapters.ReloadAdapter(pb.ReloadAdapterRequest(name="new"))
    assert again.adapter.generation == 10
    for mode in (pb.UNLOAD_MODE_UNSPECIFIED, pb.UNLOAD_MODE_WAIT, pb.UNLOAD_MODE_REFUSE):
        served.engine.adapters["new"] = ready("new")
        await served.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="new", mode=mode))
    assert served.engine.unloads == [("new", True), ("new", True), ("new", False)]


async def test_get_shows_everything(served: Served) -> None:
    served.engine.adapters["full"] = AdapterInfo(
        name="full",
        state=AdapterState.FAILED,
        source="folder",
        generation=1,
        kind="prompt_tuning",
        primitives=("prefix",),
        modules=2,
        rank=3,
        virtual_tokens=4,
        parameters=5,
        disk_bytes=6,
        compiled_bytes=7,
        content_hash="ab",
        running_requests=8,
        load_time=1700000000.25,
        load_seconds=0.5,
        problems=("broken",),
        warnings=("odd",),
        mergeable=True,
        merged_only=True,
        own_prompts=True,
        merged=MergedInfo(MergeState.FAILED, problem="no room"),
    )
    shown = await served.adapters.GetAdapter(pb.GetAdapterRequest(name="full", nearest_tokens=2))
    adapter = shown.adapter
    assert adapter.state == pb.ADAPTER_STATE_FAILED
    assert adapter.load_time.ToMilliseconds() == 1700000000250
    unset = [field.name for field in pb.Adapter.DESCRIPTOR.fields if not getattr(adapter, field.name)]
    assert unset == []
    assert (adapter.merged.state, adapter.merged.problem) == (pb.MERGE_STATE_FAILED, "no room")
    assert not adapter.merged.HasField("deviation")
    assert not shown.nearest_tokens, "it failed to load, and is shown all the same"
    soft = await served.adapters.GetAdapter(pb.GetAdapterRequest(name="json", nearest_tokens=2))
    assert [[near.token_id for near in row.tokens] for row in soft.nearest_tokens] == [[5, 5], [5, 5]]
    plain = await served.adapters.GetAdapter(pb.GetAdapterRequest(name="json"))
    assert not plain.nearest_tokens
    assert not plain.adapter.HasField("load_time")


async def test_list_is_paged(served: Served) -> None:
    served.engine.adapters = {f"a{number:03}": ready(f"a{number:03}") for number in range(250)}
    names: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        page = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=token))
        assert page.total_size == 250
        names += [adapter.name for adapter in page.adapters]
        token, pages = page.next_page_token, pages + 1
    assert names == sorted(served.engine.adapters)
    assert pages == 3
    whole = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000))
    assert len(whole.adapters) == 250
    assert whole.next_page_token == ""


async def test_a_page_is_no_larger_than_a_message_may_be(served: Served) -> None:
    problems = tuple("x" * 500 for _ in range(50))
    served.engine.adapters = {
        f"a{number:03}": AdapterInfo(f"a{number:03}", AdapterState.FAILED, "folder", problems=problems)
        for number in range(200)
    }
    names: list[str] = []
    token = ""
    while not names or token:
        page = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000, page_token=token))
        assert 0 < page.ByteSize() < 2**20
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
    assert names == sorted(served.engine.adapters)


async def test_a_page_holds_its_place_while_adapters_come_and_go(served: Served) -> None:
    served.engine.adapters = {name: ready(name) for name in "bdf"}
    page = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
    del served.engine.adapters["d"]
    served.engine.adapters["a"] = ready("a")
    rest = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=page.next_page_token))
    assert [adapter.name for adapter in rest.adapters] == ["f"]


@pytest.mark.parametrize("token", ["x", "!!!!", "é", base64.b64encode(b"json").decode(), "MTr_", "a" * 5000])
async def test_a_foreign_page_token_is_refused(served: Served, token: str) -> None:
    error = await refused(served.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=token)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["BadRequest"].field_violations[0].field == "page_token"


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListAdapters", pb.ListAdaptersRequest(page_size=1001), "page_size"),
        ("GetAdapter", pb.GetAdapterRequest(name="json", nearest_tokens=17), "nearest_tokens"),
        ("GetAdapter", pb.GetAdapterRequest(), "name"),
        ("LoadAdapter", pb.LoadAdapterRequest(name="../x"), "name"),
        ("ReloadAdapter", pb.ReloadAdapterRequest(name="a@b"), "name"),
        ("UnloadAdapter", pb.UnloadAdapterRequest(name="/"), "name"),
        ("UnloadAdapter", pb.UnloadAdapterRequest(name="json", mode=9), "mode"),
    ],
)
async def test_bad_fields(served: Served, method: str, request_: Any, field: str) -> None:
    error = await refused(getattr(served.adapters, method)(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["BadRequest"].field_violations[0].field == field


async def test_unknown_adapter(served: Served) -> None:
    error = await refused(served.adapters.GetAdapter(pb.GetAdapterRequest(name="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(error)["ErrorInfo"].metadata["adapter"] == "nobody"


async def test_a_merged_copy_is_kept_and_shown(served: Served) -> None:
    before = (await served.adapters.GetAdapter(pb.GetAdapterRequest(name="json"))).adapter
    assert not before.HasField("merged")
    unchanged = await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="json"))
    assert unchanged.adapter == before
    shown = (await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="json", merged=True))).adapter
    assert shown.mergeable
    copy = shown.merged
    assert (copy.state, copy.pinned, copy.memory_bytes) == (pb.MERGE_STATE_READY, True, 100)
    assert (copy.dtype, copy.merge_seconds, copy.problem) == ("float32", 0.25, "")
    off = copy.deviation
    assert (off.largest, off.mean, off.greedy_agreement, off.positions) == (0.5, 0.125, 0.75, 8)
    released = await served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="json", merged=False))
    assert not released.adapter.merged.pinned


async def test_what_is_not_served(served: Served) -> None:
    error = await refused(served.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="json", pinned=True)))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    async def parts() -> Any:
        for _ in range(3):
            yield pb.UploadAdapterRequest(name="json", data=b"x" * 1000)

    error = await refused(served.adapters.UploadAdapter(parts()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details_of(error)["ErrorInfo"].reason == "NOT_SUPPORTED"


@pytest.mark.parametrize(
    "header", [None, "", TOKEN, f"Bearer {TOKEN}x", f"bearer {TOKEN}", f"Basic {TOKEN}", "Bearer "]
)
async def test_without_the_token_no_adapter_method_answers(serve_with: Serve, header: str | None) -> None:
    metadata = () if header is None else (("authorization", header),)
    async with serve_with(admin_token=TOKEN) as served:
        methods = pb.DESCRIPTOR.services_by_name["AdapterService"].methods
        for method in methods:
            message = getattr(pb, method.input_type.name)()
            argument = iter([message]) if method.client_streaming else message
            error = await refused(getattr(served.adapters, method.name)(argument, metadata=metadata))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert TOKEN not in error.details()
        assert not served.engine.loads


async def test_with_the_token_they_do(serve_with: Serve) -> None:
    async with serve_with(admin_token=TOKEN) as served:
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        page = await served.adapters.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata)
        assert page.total_size == 2
        await served.inference.Generate(GenerateRequest(prompt="hi"))  # inference asks for no token
