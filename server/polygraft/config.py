"""The server's settings: each defined once, as a flag, a `POLYGRAFT_*` variable and a TOML key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from polygraft.addresses import OFF, Address
from polygraft.errors import ConfigError

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def parse_bytes(value: Any) -> Any:
    """Read a byte count such as 268435456, "256MiB" or "1.5GB"; anything else is passed on unread."""
    if isinstance(value, str):
        for unit, factor in _UNITS.items():
            if value.endswith(unit):
                try:
                    return int(float(value[: -len(unit)]) * factor)
                except (ValueError, OverflowError):
                    return value
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class _ConfigFile(PydanticBaseSettingsSource):
    """The TOML file that the sources before this one name."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked for: this source answers for all fields at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """All settings of the file; raises ConfigError if there is none."""
        path = self.current_state.get("config")
        if not path:
            return {}
        try:
            settings = tomllib.loads(Path(path).read_bytes().decode())
        except OSError as error:
            raise ConfigError("--config", f"can't read {path}: {error.strerror}") from error
        except ValueError as error:  # not TOML, or not UTF-8
            raise ConfigError("--config", f"{path} isn't TOML: {error}") from error
        return {name: value for name, value in settings.items() if value != ""}


class ServerConfig(BaseSettings):
    """All settings of `polygraft serve`. Flags beat environment variables, these beat the TOML file.

    An empty variable or an empty value in the file counts as unset.
    """

    model_config = SettingsConfigDict(
        env_prefix="POLYGRAFT_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_prog_name="polygraft serve",
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(None, description="TOML file with any of these settings")
    model: str = Field(
        "default", description="local folder or hub id of the base model; default is SmolLM2-135M-Instruct"
    )
    served_model_name: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="the base's name in GetModel, metrics and the log [default: the hub id, or the "
        "folder's own name]",
    )
    adapters: Path | None = Field(None, description="folder whose sub-folders are adapters")
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT of the gRPC server; port 0 picks one")
    metrics: str = Field(
        "127.0.0.1:9464", description="HOST:PORT of the Prometheus endpoint; off turns it off"
    )
    device: str = Field("cpu", description="torch device of the base model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type the base computes in; auto takes the checkpoint's"
    )
    quantization: Literal["none", "int8", "nf4", "fp4"] = Field(
        "none",
        description="how the base's weights are kept: int8 is fastest on a CPU, nf4 and fp4 are smallest",
    )
    head_quantization: Literal["none", "int8"] = Field(
        "none",
        description="how the head is kept, which quantization leaves as it is; int8 is faster, on a CPU",
    )
    double_quantization: bool = Field(True, description="quantize the scales of nf4 and fp4 as well")
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type adapters are kept in; auto is bfloat16 on such a base, else the file's"
    )
    lora_path: Literal["auto", "unmerged", "merged"] = Field(
        "unmerged",
        description="how low-rank weights are applied where a request doesn't say: unmerged is beside the "
        "base's weights, any mix in a step; merged is in a copy of them, one adapter in a step; auto merges "
        "an adapter while it holds nearly all requests",
    )
    merged_bytes: Bytes | None = Field(
        None, ge=0, description="memory of merged copies [default: a fifth of what is free]"
    )
    requantize_merged: bool = Field(
        False, description="on a quantized base, keep merged copies quantized too, which rounds a second time"
    )
    combined_bytes: Bytes | None = Field(
        None,
        ge=0,
        description="memory of linear combinations of adapters, such as 256MiB [default: a twentieth of what "
        "is free, at most 256MiB]",
    )
    loading_bytes: Bytes = Field(
        2**29,
        gt=0,
        description="memory that adapters may take together while they are being loaded, beside what stays "
        "of them, such as 512MiB; others wait, and a larger one is loaded alone",
    )
    kv_cache_bytes: Bytes | None = Field(
        None, gt=0, description="memory of the KV cache, such as 256MiB [default: a quarter of what is free]"
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens in a block of the KV cache")
    prefix_caching: bool = Field(True, description="find a prompt's beginning in the KV cache")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="most requests that run at once")
    max_num_batched_tokens: int = Field(512, ge=1, description="most tokens in one step")
    max_step_ms: float = Field(
        500.0,
        ge=0,
        description="target milliseconds per step; bounds long prompts and scores. 0 is no bound",
    )
    max_context_length: int | None = Field(
        None, ge=2, description="most tokens of one request [default: the model's own limit]"
    )
    max_waiting: int = Field(1024, ge=1, description="most requests in the queue")
    max_adapters: int = Field(1024, ge=1, description="most adapters loaded at once")
    max_adapter_rank: int = Field(256, ge=1, description="largest rank of an adapter")
    max_adapter_bytes: Bytes = Field(2**30, gt=0, description="largest adapter, compiled")
    max_virtual_tokens: int = Field(1024, ge=1, description="most virtual tokens of an adapter")
    admin_token: SecretStr | None = Field(
        None, description="token that AdapterService asks for; needed to listen beyond loopback"
    )
    max_message_bytes: Bytes = Field(4 * 2**20, gt=0, description="largest gRPC message")
    max_unread_bytes: Bytes = Field(
        2**20, gt=0, description="memory of a stream's unread output; beyond it the stream ends"
    )
    unread_timeout: float = Field(
        60.0, gt=0, description="seconds after which a stream ends if its client reads nothing"
    )
    step_timeout: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds after which a step counts as hung and the server ends; 0 is never",
    )
    drain_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="seconds that running requests get after SIGTERM"
    )
    threads: int | None = Field(
        None, ge=1, description="compute threads [default: one per core that the process may use]"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["text", "json"] = Field(
        "text", description="form of the log: a readable line for each record, or a JSON object"
    )
    log_requests: bool = Field(True, description="log a line for each finished request")

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
        return init_settings, env_settings, _ConfigFile(settings_cls)

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

    def check(self) -> None:
        """Check what involves more than one setting; raises ConfigError."""
        address = Address.parse("--listen", self.listen)
        if self.metrics:
            Address.parse("--metrics", self.metrics)
        if not address.is_loopback and self.admin_token is None:
            raise ConfigError(
                "--admin-token",
                f"needed to listen on {address.host}: anyone who reaches it could load and unload adapters",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "--max-num-batched-tokens",
                f"{self.max_num_batched_tokens} is less than --max-num-seqs {self.max_num_seqs}: "
                "some running requests would get no token in a step",
            )
        if self.adapters is not None and not self.adapters.is_dir():
            raise ConfigError("--adapters", f"no such folder: {self.adapters}")
