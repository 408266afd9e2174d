"""The server's settings: each defined once, as a flag, a `POLYGRAFT_*` variable and a TOML key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from polygraft.addresses import OFF, Address
from polygraft.config_sources import ConfigFile, flag
from polygraft.errors import ConfigError
from polygraft.sizes import parse_bytes


class Group(StrEnum):
    """What a setting is about: the headings of the help and of a printed configuration."""

    MODEL = "Base model"
    ADAPTERS = "Adapters"
    ADDRESSES = "Addresses and access"
    MEMORY = "Memory"
    STEPS = "Steps and cache"
    LIMITS = "Limits on requests and streams"
    PROCESS = "Process and log"


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def _setting(
    group: Group, default: Any, description: str, *, unset: str = "", metavar: str = "", **limits: Any
) -> Any:
    """Declare a setting.

    Args:
        unset: what is done if it isn't set, where the default is None.
        metavar: its value in the help, where the type doesn't say it.
        limits: as `pydantic.Field` takes them.
    """
    extra: dict[str, Any] = {"group": group, "unset": unset, "metavar": metavar}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class ServerConfig(BaseSettings):
    """All settings of `polygraft serve`. Flags beat environment variables, these beat the TOML file.

    An empty variable or an empty value in the file counts as unset.
    """

    model_config = SettingsConfigDict(
        env_prefix="POLYGRAFT_", env_ignore_empty=True, frozen=True, extra="forbid", protected_namespaces=()
    )
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    model: str = _setting(
        Group.MODEL, "default",
        "Local folder or hub id of the base model. `default` is SmolLM2-135M-Instruct.", metavar="MODEL",
    )  # fmt: skip
    served_model_name: str | None = _setting(
        Group.MODEL, None, "Name of the base in GetModel, metrics and the log.",
        unset="the hub id, or the folder's own name", metavar="NAME", min_length=1, max_length=128,
    )  # fmt: skip
    device: str = _setting(Group.MODEL, "cpu", "Torch device of the base model.", metavar="DEVICE")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        Group.MODEL, "auto", "Type the base computes in. `auto` takes the checkpoint's."
    )
    quantization: Literal["none", "int8", "nf4", "fp4"] = _setting(
        Group.MODEL, "none",
        "How the base's weights are kept. `int8` is the fastest on a CPU; `nf4` and `fp4` are the smallest.",
    )  # fmt: skip
    head_quantization: Literal["none", "int8"] = _setting(
        Group.MODEL, "none",
        "How the output head is kept, which --quantization doesn't change. `int8` is faster on a CPU.",
    )  # fmt: skip
    double_quantization: bool = _setting(Group.MODEL, True, "Quantize the scales of nf4 and fp4 as well.")
    max_context_length: int | None = _setting(
        Group.MODEL,
        None,
        "Most tokens of one request, prompt and answer.",
        unset="the model's own limit",
        ge=2,
    )

    adapters: Path | None = _setting(
        Group.ADAPTERS, None,
        "Folder whose sub-folders are adapters, as PEFT or AdapterHub saves them.", unset="no adapters",
        metavar="FOLDER",
    )  # fmt: skip
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        Group.ADAPTERS, "auto",
        "Type adapters are kept in. `auto` is bfloat16 on a bfloat16 base, otherwise the file's type.",
    )  # fmt: skip
    lora_path: Literal["auto", "unmerged", "merged"] = _setting(
        Group.ADAPTERS, "unmerged",
        "How LoRA runs if a request doesn't say. `unmerged` computes a side path, and a step mixes any "
        "adapters. `merged` runs on a copy of the weights with the adapter folded in, one adapter in a step. "
        "`auto` merges an adapter while nearly all requests are for it.",
    )  # fmt: skip
    requantize_merged: bool = _setting(
        Group.ADAPTERS, False,
        "On a quantized base, quantize merged copies too. This rounds the weights a second time.",
    )  # fmt: skip
    max_adapters: int = _setting(Group.ADAPTERS, 1024, "Most adapters that are loaded at once.", ge=1)
    max_adapter_rank: int = _setting(Group.ADAPTERS, 256, "Largest rank of an adapter.", ge=1)
    max_adapter_bytes: Bytes = _setting(
        Group.ADAPTERS, 2**30, "Largest size of an adapter in memory.", metavar="BYTES", gt=0
    )
    max_virtual_tokens: int = _setting(Group.ADAPTERS, 1024, "Most virtual tokens of an adapter.", ge=1)

    listen: str = _setting(
        Group.ADDRESSES, "127.0.0.1:50051", "Address of the gRPC server. Port 0 picks a free one.",
        metavar="HOST:PORT",
    )  # fmt: skip
    metrics: str = _setting(
        Group.ADDRESSES, "127.0.0.1:9464",
        "Address of /metrics, /healthz and /readyz over HTTP. `off` turns them off.", metavar="HOST:PORT",
    )  # fmt: skip
    admin_token: SecretStr | None = _setting(
        Group.ADDRESSES, None,
        "Secret that callers of AdapterService must send. Needed to listen beyond loopback. Set it by its "
        "variable: other users of the machine can read flags.",
        unset="none is asked for", metavar="TOKEN",
    )  # fmt: skip

    kv_cache_bytes: Bytes | None = _setting(
        Group.MEMORY,
        None,
        "Memory of the KV cache.",
        unset="a quarter of what is free",
        metavar="BYTES",
        gt=0,
    )
    merged_bytes: Bytes | None = _setting(
        Group.MEMORY, None, "Memory of merged copies of the weights.", unset="a fifth of what is free",
        metavar="BYTES", ge=0,
    )  # fmt: skip
    combined_bytes: Bytes | None = _setting(
        Group.MEMORY, None, "Memory of linear combinations of adapters.",
        unset="a twentieth of what is free, at most 256MiB", metavar="BYTES", ge=0,
    )  # fmt: skip
    loading_bytes: Bytes = _setting(
        Group.MEMORY, 2**29,
        "Memory that adapters may take together while they are loaded, besides what they keep. Further loads "
        "wait; a larger adapter is loaded alone.", metavar="BYTES", gt=0,
    )  # fmt: skip

    block_size: int = _setting(Group.STEPS, 16, "Tokens in a block of the KV cache.", ge=1, le=256)
    prefix_caching: bool = _setting(
        Group.STEPS, True, "Reuse the KV cache of prompts that begin with the same tokens."
    )
    max_num_seqs: int = _setting(Group.STEPS, 256, "Most requests that run at once.", ge=1, le=4096)
    max_num_batched_tokens: int = _setting(Group.STEPS, 512, "Most tokens in one step.", ge=1)
    max_step_ms: float = _setting(
        Group.STEPS, 500.0,
        "Target milliseconds of a step, so that long prompts and scores don't delay others. 0 is no target.",
        metavar="MS", ge=0,
    )  # fmt: skip
    threads: int | None = _setting(
        Group.STEPS, None, "Compute threads.", unset="one for each core that the process may use", ge=1
    )

    max_waiting: int = _setting(Group.LIMITS, 1024, "Most requests in the queue.", ge=1)
    max_message_bytes: Bytes = _setting(
        Group.LIMITS, 4 * 2**20, "Largest gRPC message, in either direction.", metavar="BYTES", gt=0
    )
    max_unread_bytes: Bytes = _setting(
        Group.LIMITS,
        2**20,
        "Most unread output of a stream. Beyond it the stream ends.",
        metavar="BYTES",
        gt=0,
    )
    unread_timeout: float = _setting(
        Group.LIMITS, 60.0, "Seconds after which a stream ends if its client reads nothing.",
        metavar="SECONDS", gt=0,
    )  # fmt: skip
    step_timeout: float = _setting(
        Group.LIMITS, 300.0, "Seconds after which a step counts as hung and the server exits. 0 is never.",
        metavar="SECONDS", ge=0, allow_inf_nan=False,
    )  # fmt: skip
    drain_timeout: float = _setting(
        Group.LIMITS, 30.0, "Seconds that running requests have to finish after SIGTERM.",
        metavar="SECONDS", ge=0, allow_inf_nan=False,
    )  # fmt: skip

    config: Path | None = _setting(
        Group.PROCESS, None, "TOML file with any of these settings.", unset="no file", metavar="FILE"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        Group.PROCESS, "info", "Lowest level that is logged."
    )
    log_format: Literal["text", "json"] = _setting(
        Group.PROCESS, "text", "Form of a log record: a readable line, or a JSON object."
    )
    log_requests: bool = _setting(Group.PROCESS, True, "Log a line for each finished call.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the TOML file named by `config` last; a flag or a variable may name it."""
        return init_settings, env_settings, ConfigFile(settings_cls)

    @field_validator("metrics")
    @classmethod
    def _off_is_empty(cls, metrics: str) -> str:
        return "" if metrics.strip().lower() == OFF else metrics

    @field_validator("admin_token")
    @classmethod
    def _fit_for_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        """Strip the white space that a file or `echo` leaves; the rest must be sendable as a header."""
        if token is None:
            return None
        bare = token.get_secret_value().strip()
        if not re.fullmatch(r"[\x20-\x7e]*", bare):
            raise ValueError(
                "holds a character that no header can carry: use printable ASCII, for example "
                "`openssl rand -hex 32`"
            )
        if len(bare) < 16:
            raise ValueError("must have at least 16 characters")
        return SecretStr(bare)

    @property
    def origins(self) -> Mapping[str, str]:
        """The flag, variable or key that each setting came from; without those at their defaults."""
        return self._origins

    def set_origins(self, origins: dict[str, str]) -> None:
        """Remember where the settings came from, for errors and for printing them."""
        self._origins = origins

    def name_of(self, setting: str) -> str:
        """Return what an error should call a setting."""
        return self._origins.get(setting, flag(setting))

    def check(self) -> None:
        """Check what involves more than one setting; raises ConfigError."""
        address = Address.parse(self.name_of("listen"), self.listen)
        if self.metrics:
            Address.parse(self.name_of("metrics"), self.metrics)
        if not address.is_loopback and self.admin_token is None:
            raise ConfigError(
                self.name_of("admin_token"),
                f"needed to listen on {address.host}: anyone who reaches it could load and unload adapters. "
                "Set POLYGRAFT_ADMIN_TOKEN, for example to what `openssl rand -hex 32` prints",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                self.name_of("max_num_batched_tokens"),
                f"{self.max_num_batched_tokens} is less than {self.name_of('max_num_seqs')} "
                f"{self.max_num_seqs}: some running requests would get no token in a step",
            )
        if self.adapters is not None and not self.adapters.is_dir():
            raise ConfigError(self.name_of("adapters"), f"no such folder: {self.adapters}")
