"""Where settings come from: flags, variables and the TOML file, and what each source calls them."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from polygraft.errors import ConfigError
from polygraft.near_names import did_you_mean

PREFIX = "POLYGRAFT_"
_OTHERS = {"CACHE", "SERVER", "STORE", "REQUIRE_PROMETHEUS", "RECORD_STEP_COST"}
"""Variables of other commands, of deploy/compose.yaml and of the tests."""
_KUBERNETES = re.compile(r"(SERVICE|PORT)(_|$)")
"""Kubernetes sets POLYGRAFT_SERVICE_HOST, POLYGRAFT_PORT and the like for a service of this name."""


def flag(setting: str, *, negated: bool = False) -> str:
    """The command line's name for a setting; `negated` is the switch that turns it off."""
    return f"--{'no-' if negated else ''}{setting.replace('_', '-')}"


def variable(setting: str) -> str:
    """The environment's name for a setting."""
    return f"{PREFIX}{setting.upper()}"


def read_file(path: str | Path, settings: Collection[str]) -> dict[str, tuple[str, Any]]:
    """The settings of a TOML file: each one's key as written there, and its value. Empty values are left out.

    A key is a setting's name with `-` or `_` between its words.

    Raises:
        ConfigError: the file can't be read, isn't TOML, or has an unknown key or one twice.
    """
    try:
        content = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError("--config", f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError("--config", f"{path} isn't TOML: {error}") from error
    found: dict[str, tuple[str, Any]] = {}
    for key, value in content.items():
        setting = key.replace("-", "_")
        if isinstance(value, dict):
            raise ConfigError(f"{key} in {path}", "is a table; all settings are at the top level of the file")
        if setting == "config" and value != "":
            raise ConfigError(f"{key} in {path}", "a settings file can't name another one")
        if setting not in settings:
            known = (name.replace("_", "-") for name in settings)
            raise ConfigError(
                f"{key} in {path}", f"no such setting{did_you_mean(key.replace('_', '-'), known)}"
            )
        if setting in found:
            raise ConfigError(f"{key} in {path}", f"is the same setting as {found[setting][0]}, also there")
        found[setting] = key, value
    return {setting: entry for setting, entry in found.items() if entry[1] != ""}


class ConfigFile(PydanticBaseSettingsSource):
    """The TOML file that the sources before this one name."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked for: this source answers for all fields at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """All settings of the file. Raises: as `read_file`."""
        path = self.current_state.get("config")
        if not path:
            return {}
        found = read_file(path, self.settings_cls.model_fields)
        return {setting: value for setting, (_, value) in found.items()}


def origins(
    settings: Collection[str], given: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, str]:
    """Return where each setting that isn't at its default comes from, as errors name it.

    Args:
        given: the settings of the command line.

    Raises:
        ConfigError: as `read_file`.
    """
    found: dict[str, str] = {}
    path = given.get("config") or environment.get(variable("config"))
    if path:
        keys = read_file(path, settings)
        found |= {setting: f"{key} in {path}" for setting, (key, _) in keys.items()}
    found |= {setting: variable(setting) for setting in settings if environment.get(variable(setting))}
    return found | {setting: flag(setting, negated=value is False) for setting, value in given.items()}


def mistaken_variables(settings: Collection[str], environment: Iterable[str]) -> list[str]:
    """A warning for each `POLYGRAFT_` variable that is nearly, but not quite, a setting's."""
    warnings = []
    for name in sorted(environment):
        rest = name.removeprefix(PREFIX)
        if rest == name or rest in _OTHERS or rest.lower() in settings or _KUBERNETES.match(rest):
            continue
        if found := difflib.get_close_matches(rest.lower(), settings, n=1, cutoff=0.8):
            warnings.append(f"{name} is not a setting and is ignored; did you mean {variable(found[0])}?")
    return warnings
