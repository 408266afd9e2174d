"""AdapterService on top of an engine."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from polygraft.core.names import check_name
from polygraft.engine.client import EngineClient
from polygraft.errors import InvalidRequest, NotSupported
from polygraft.rpc import responses
from polygraft.rpc.access_log import note_adapters
from polygraft_api.v1 import adapters_pb2 as pb
from polygraft_api.v1 import adapters_pb2_grpc
from polygraft_types.adapters import AdapterInfo, AdapterState

_DEFAULT_PAGE = 100
_MAX_PAGE = 1000
_PAGE_BYTES = 2**19
_MAX_NEAREST = 16
_TOKEN_PREFIX = b"1:"

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """Translates between the contract and the registry; errors are the interceptor's to map.

    Args:
        message_bytes: the largest message that is sent.
    """

    def __init__(self, handle: EngineClient, message_bytes: int = 4 * 2**20) -> None:
        self._handle = handle
        # Leaves room for the page token and the fields' tags, and is built within a few milliseconds.
        self._page_bytes = min(message_bytes // 2, _PAGE_BYTES)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:  # noqa: N802
        """Load a folder of the store."""
        name = _name(request.name)
        info = await self._handle.load_adapter(name, request.source)
        return pb.LoadAdapterResponse(adapter=responses.adapter(info))

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Unload, waiting for running requests or refusing if there are any."""
        name = _name(request.name)
        if request.mode not in pb.UnloadMode.values():
            raise InvalidRequest("mode", f"unknown value {request.mode}")
        info = await self._handle.unload_adapter(name, wait=request.mode != pb.UNLOAD_MODE_REFUSE)
        return pb.UnloadAdapterResponse(adapter=responses.adapter(info))

    async def ReloadAdapter(  # noqa: N802
        self, request: pb.ReloadAdapterRequest, context: Context
    ) -> pb.ReloadAdapterResponse:
        """Load a folder again under a new generation."""
        info = await self._handle.reload_adapter(_name(request.name))
        return pb.ReloadAdapterResponse(adapter=responses.adapter(info))

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:  # noqa: N802
        """Show one adapter."""
        name = _name(request.name)
        count = request.nearest_tokens
        if count > _MAX_NEAREST:
            raise InvalidRequest("nearest_tokens", f"must be in [0, {_MAX_NEAREST}], got {count}")
        info = self._handle.get_adapter(name)
        # One that isn't loaded has no soft prompt, but is worth showing for its problems.
        ready = info.state == AdapterState.READY
        rows = await self._handle.nearest_tokens(name, count) if count and ready else []
        return pb.GetAdapterResponse(
            adapter=responses.adapter(info), nearest_tokens=[responses.nearest(row) for row in rows]
        )

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """List adapters by name, a page at a time."""
        if request.page_size > _MAX_PAGE:
            raise InvalidRequest("page_size", f"must be in [0, {_MAX_PAGE}], got {request.page_size}")
        after = _read_page_token(request.page_token)
        infos = self._handle.list_adapters()
        rest = [info for info in infos if after is None or info.name > after]
        page = self._page(rest[: request.page_size or _DEFAULT_PAGE])
        return pb.ListAdaptersResponse(
            adapters=page,
            next_page_token=_page_token(page[-1].name) if len(page) < len(rest) else "",
            total_size=len(infos),
        )

    def _page(self, infos: Sequence[AdapterInfo]) -> list[pb.Adapter]:
        """As many adapters as one message holds, at least one. Their problems and warnings may be long."""
        page: list[pb.Adapter] = []
        size = 0
        for info in infos:
            adapter = responses.adapter(info)
            size += adapter.ByteSize()
            if page and size > self._page_bytes:
                break
            page.append(adapter)
        return page

    async def UpdateAdapter(  # noqa: N802
        self, request: pb.UpdateAdapterRequest, context: Context
    ) -> pb.UpdateAdapterResponse:
        """Keep a merged copy for an adapter, or keep it no longer."""
        name = _name(request.name)
        if request.HasField("pinned"):
            raise NotSupported("pinned", "not served yet: every loaded adapter is resident")
        if not request.HasField("merged"):
            return pb.UpdateAdapterResponse(adapter=responses.adapter(self._handle.get_adapter(name)))
        info = await self._handle.update_adapter(name, merged=request.merged)
        return pb.UpdateAdapterResponse(adapter=responses.adapter(info))

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Not served yet."""
        raise NotSupported("UploadAdapter", "not served yet")


def _page_token(last: str) -> str:
    # The last name rather than an index: adapters may come and go between two pages.
    return base64.urlsafe_b64encode(_TOKEN_PREFIX + last.encode()).decode()


def _name(given: str) -> str:
    """Check an adapter's name, and note it for the access log. Raises InvalidRequest."""
    name = check_name(given)
    note_adapters(name)
    return name


def _read_page_token(token: str) -> str | None:
    if not token:
        return None
    try:
        data = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        if not data.startswith(_TOKEN_PREFIX):
            raise ValueError("foreign")
        return data.removeprefix(_TOKEN_PREFIX).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("page_token", "not one that this method returned") from error
