"""What a server says when it is ready."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polygraft.addresses import Address
from polygraft.telemetry.greeting import command_to_try, greeting
from polygraft_types.adapters import AdapterInfo, AdapterState
from tests.rpc.fake_engine import MODEL, ready

HERE = Address("--listen", "127.0.0.1", 50051)


def failed(name: str) -> AdapterInfo:
    return AdapterInfo(name, AdapterState.FAILED, source=name)


def test_it_tells_what_is_served_and_where() -> None:
    model = replace(MODEL, model="SmolLM2", parameters=135_000_000, dtype="bfloat16", quantization="int8")
    adapters = [ready("a"), ready("b"), ready("c", kind="ia3"), failed("d")]
    served, where, command = greeting(model, adapters, HERE, Address("--metrics", "127.0.0.1", 9464))
    assert served == (
        "serving SmolLM2 (135M parameters, bfloat16 with int8 weights, on cpu) with 3 adapters (2 lora, 1 ia3); "
        "1 failed to load, `polygraft adapters list` says why"
    )
    assert where == "gRPC on 127.0.0.1:50051; /metrics, /healthz and /readyz on http://127.0.0.1:9464"
    assert command == "try: polygraft generate 'Maria Lopez, 34, is a teacher from Madrid.' --adapter a"


def test_it_tells_what_there_is_not() -> None:
    served, where, _ = greeting(MODEL, [], HERE, None)
    assert served.endswith("with no adapters")
    assert where.endswith("metrics are off")


@pytest.mark.parametrize(
    ("adapters", "listening", "ending"),
    [
        ([], HERE, "Madrid.'"),
        ([failed("a")], HERE, "Madrid.'"),
        ([ready("a", kind="ia3"), ready("b")], HERE, "--adapter b"),
        ([ready("a", kind="ia3")], HERE, "--adapter a"),
        ([], HERE.with_port(1234), "--server 127.0.0.1:1234"),
        ([], Address("--listen", "0.0.0.0", 1234), "--server 127.0.0.1:1234"),
        ([], Address("--listen", "0.0.0.0", 50051), "Madrid.'"),
        ([], Address("--listen", "::", 50051), "--server '[::1]:50051'"),
        ([], Address("--listen", "host", 50051), "--server host:50051"),
    ],
)
def test_the_command_works_from_here(adapters: list[AdapterInfo], listening: Address, ending: str) -> None:
    command = command_to_try(adapters, listening)
    assert command.startswith("polygraft generate 'Maria Lopez")
    assert command.endswith(ending)
