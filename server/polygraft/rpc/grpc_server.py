"""The gRPC server: its options, its services, and how it opens and closes."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from polygraft.addresses import Address, Reservation
from polygraft.config import ServerConfig
from polygraft.engine.client import EngineClient
from polygraft.engine.workers.worker import Worker
from polygraft.errors import ConfigError, PolygraftError
from polygraft.rpc.access_log import AccessLog
from polygraft.rpc.adapters import AdapterServicer
from polygraft.rpc.calls import Calls
from polygraft.rpc.inference import InferenceServicer
from polygraft.rpc.interceptors import CallInterceptor, CallObserver
from polygraft.rpc.limits import MessageLimits
from polygraft.rpc.writes import Writes
from polygraft_api.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
_MAX_LARGE_MESSAGES = 64
"""How many may wait to be parsed."""
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class GrpcServer:
    """Serves an engine over gRPC, with health per service and reflection.

    Args:
        config: address, limits and token.
        handle: the engine.
        observer: is told about every call's end.
    """

    def __init__(
        self, config: ServerConfig, handle: EngineClient, observer: CallObserver | None = None
    ) -> None:
        self._config = config
        token = config.admin_token
        self.calls = Calls(_most_calls(config))
        self._health = health.aio.HealthServicer()

        def note_unread() -> None:
            if observer is not None:
                observer.stream_unread("time")

        worker = Worker("large messages", _MAX_LARGE_MESSAGES)
        interceptor = CallInterceptor(
            self.calls,
            MessageLimits(handle.model),
            worker,
            Writes(config.unread_timeout, note_unread),
            AccessLog(enabled=config.log_requests),
            observer,
            token.get_secret_value() if token else None,
        )
        self._server = grpc.aio.server(interceptors=[interceptor], options=_options(config))
        # One slot per call, since a call builds one answer at a time: none is refused.
        inference = InferenceServicer(handle, worker, Worker("large answers", _most_calls(config)))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        adapters = AdapterServicer(handle, config.max_message_bytes)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (INFERENCE, ADAPTERS, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            ConfigError: the address is taken or not this machine's.
        """
        wanted = Address.parse(self._config.name_of("listen"), self._config.listen)
        port = wanted.port
        try:
            # One by one: given a name, gRPC is content if it can listen on some of its addresses.
            for address in wanted.resolve():
                port = self._server.add_insecure_port(str(address.with_port(port)))
        except RuntimeError as error:
            await self._server.stop(None)
            # gRPC doesn't say why it failed; binding the port ourselves does.
            Reservation({wanted.flag: str(wanted)}).release_all()
            raise ConfigError(wanted.flag, f"can't listen on {wanted}: {error}") from error
        await self._server.start()
        for name in (INFERENCE, ADAPTERS):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def refuse(self, error: PolygraftError) -> None:
        """Answer every new call with `error`; health turns to NOT_SERVING, and goes on answering."""
        self.calls.refusal = error
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float | None) -> None:
        """Close; calls that are left after `grace` seconds (None: at once) are cancelled."""
        await self._server.stop(grace)


def _most_calls(config: ServerConfig) -> int:
    """Calls in flight: enough to fill the queue and see it refuse, and no more."""
    return config.max_num_seqs + config.max_waiting + 64


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # One connection may fill the queue: a full one must answer, not make callers wait unseen.
        ("grpc.max_concurrent_streams", _most_calls(config)),
        # A taken port is an error, not a port shared with another server.
        ("grpc.so_reuseport", 0),
        # Dead peers are noticed within 80 seconds, so that their streams are freed.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
