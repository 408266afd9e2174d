"""A configuration as a TOML file, for `polygraft serve --print-config` and the example in deploy/."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from polygraft.config import Group, ServerConfig
from polygraft.errors import ConfigError
from polygraft.sizes import shown_bytes

_WIDTH = 100
_HEADER = (
    "Settings of `polygraft serve`. `polygraft serve --config FILE` starts with them, and `polygraft serve "
    "--print-config` prints such a file. Settings at their defaults are "
    "commented out. Options and POLYGRAFT_* "
    "variables beat the file. Sizes take units, such as 256MiB or 1.5GB. A key may have - or _ between words."
)


def config_text(config: ServerConfig) -> str:
    """Return the settings by group, each with its meaning and where its value comes from.

    The admin token is left out.

    Raises:
        ConfigError: a path isn't Unicode.
    """
    lines = _comment(_HEADER)
    for group in Group:
        lines += ["", f"# --- {group} ---"]
        for name, field in ServerConfig.model_fields.items():
            if extra(field)["group"] == group and name != "config":
                lines += ["", *_setting(name, field, getattr(config, name), config.origins.get(name))]
    return "\n".join(lines) + "\n"


def default_text(field: FieldInfo) -> str:
    """A setting's default, in words where it is computed."""
    return extra(field)["unset"] if field.default is None else value_text(field, field.default)


def value_text(field: FieldInfo, value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if extra(field)["metavar"] == "BYTES":
        return shown_bytes(value)
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def extra(field: FieldInfo) -> dict[str, Any]:
    """What `config.py` says of a setting besides its type: group, unset, metavar."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _setting(name: str, field: FieldInfo, value: Any, origin: str | None) -> list[str]:
    key = name.replace("_", "-")
    about = _comment(field.description or "")
    if origin is None:
        if field.default is None:
            return [*about, *_comment(f"Default: {extra(field)['unset']}."), f"# {key} ="]
        return [*about, f"# {key} = {_toml(field, field.default)}"]
    if isinstance(value, SecretStr):
        return [*about, f"# {key} is set by {origin}, and isn't shown"]
    if name == "metrics" and not value:
        value = "off"
    try:
        return [*about, f"{key} = {_toml(field, value)}  # from {_printable(origin)}"]
    except UnicodeEncodeError:
        raise ConfigError(origin, "isn't Unicode, and a TOML file holds nothing else") from None


def _toml(field: FieldInfo, value: Any) -> str:
    text = value_text(field, value)
    if isinstance(value, int | float) and not text.endswith("B"):  # no size with a unit; bools too
        return text
    text.encode()  # a path with other bytes fails here
    # JSON escapes what TOML wants escaped, except this. Its other escapes would be of no use in TOML,
    # which knows no surrogates.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _printable(origin: str) -> str:
    """A source's name for a comment, which line breaks and control characters in a file's name would end."""
    return "".join(char if char.isprintable() else "?" for char in origin)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]
