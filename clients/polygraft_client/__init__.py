"""Client of a Polygraft server: one base model, many adapters.

from polygraft_client import Client

with Client("127.0.0.1:50051") as client:
    answer = client.generate(chat=[{"role": "user", "content": "Hello"}], adapter="headline")
    print(answer.text)
"""

from polygraft_client._adapters import Adapters, AsyncAdapters
from polygraft_client._client import AsyncClient, Client
from polygraft_client._exceptions import (
    AlreadyExists,
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PolygraftError,
    ResourceExhausted,
    StatusError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UsageError,
)
from polygraft_client._models import (
    Adapter,
    Chunk,
    Generation,
    Health,
    MergedCopy,
    Model,
    SamplingDefaults,
    Score,
    Timings,
)
from polygraft_client._requests import Chat, GenerateOptions
from polygraft_client._streams import AsyncStream, Stream
from polygraft_types.adapters import AdapterState, Deviation, MergeState, NearestToken
from polygraft_types.answers import ContinuationScore, FinishReason, TokenLogprob, TopLogprob, Usage
from polygraft_types.requests import AdapterRef, ChatMessage, CombinationType, LoraPath

__all__ = [
    "Adapter",
    "AdapterRef",
    "AdapterState",
    "Adapters",
    "AlreadyExists",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chat",
    "ChatMessage",
    "Chunk",
    "Client",
    "CombinationType",
    "ConnectError",
    "ContinuationScore",
    "DeadlineExceeded",
    "Deviation",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "Health",
    "InternalError",
    "InvalidArgument",
    "InvalidRequest",
    "LoraPath",
    "MergeState",
    "MergedCopy",
    "Model",
    "NearestToken",
    "NotFound",
    "PermissionDenied",
    "PolygraftError",
    "ResourceExhausted",
    "SamplingDefaults",
    "Score",
    "StatusError",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "UsageError",
]

# The modules are private: errors and tracebacks name things as they are imported.
for _name in __all__:
    if hasattr(globals()[_name], "__module__") and _name != "Chat":
        globals()[_name].__module__ = "polygraft_client"
del _name
