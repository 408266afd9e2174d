"""Settings: what an empty one means, tokens, sizes, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from polygraft.cli.serve import read_config, settle
from polygraft.config import ServerConfig
from polygraft.errors import ConfigError

SECRET = "a-secret-of-enough-characters"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ServerConfig.model_fields:
        monkeypatch.delenv(f"POLYGRAFT_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ServerConfig.model_fields)
def test_an_empty_setting_is_an_unset_one(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = getattr(ServerConfig(), name)
    monkeypatch.setenv(f"POLYGRAFT_{name.upper()}", "")
    assert getattr(read_config([]), name) == default
    flag = "--" + name.replace("_", "-")
    assert getattr(read_config([f"{flag}="]), name) == default
    assert getattr(read_config([flag, ""]), name) == default
    monkeypatch.delenv(f"POLYGRAFT_{name.upper()}")
    (tmp_path / "empty.toml").write_text(f'{name} = ""\n')
    (tmp_path / "empty.toml").chmod(0o600)
    assert getattr(settle(config=tmp_path / "empty.toml"), name) in (default, tmp_path / "empty.toml")


def test_an_empty_flag_leaves_the_variable_and_an_empty_variable_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").write_text('model = "of-the-file"\n')
    monkeypatch.setenv("POLYGRAFT_CONFIG", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("POLYGRAFT_MODEL", "")
    assert read_config(["--model", ""]).model == "of-the-file"
    monkeypatch.setenv("POLYGRAFT_MODEL", "of-the-variable")
    assert read_config(["--model", ""]).model == "of-the-variable"


@pytest.mark.parametrize("off", ["off", "OFF"])
def test_metrics_are_turned_off(off: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_config(["--metrics", off]).metrics == ""
    monkeypatch.setenv("POLYGRAFT_METRICS", off)
    assert read_config([]).metrics == ""
    (tmp_path / "settings.toml").write_text(f'metrics = "{off}"\n')
    monkeypatch.delenv("POLYGRAFT_METRICS")
    assert read_config(["--config", str(tmp_path / "settings.toml")]).metrics == ""
    assert read_config([]).metrics == "127.0.0.1:9464"


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " \t{}", "\n{}\n\n"])
def test_white_space_around_the_token_doesnt_count(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAFT_ADMIN_TOKEN", around.format(SECRET))
    token = read_config([]).admin_token
    assert token is not None
    assert token.get_secret_value() == SECRET


@pytest.mark.parametrize("token", [f"{SECRET}\n{SECRET}", f"{SECRET}é", f"{SECRET}\x00", f"{SECRET}\x7f"])
def test_a_token_that_no_header_can_carry(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(admin_token=token)
    assert caught.value.flag == "--admin-token"
    assert "no header can carry" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("token", ["    tiny-secret     ", " " * 20])
def test_a_token_that_is_too_short(token: str) -> None:
    with pytest.raises(ConfigError, match="at least 16 characters"):
        settle(admin_token=token)


@pytest.mark.parametrize("size", ["infGiB", "nanMiB", "-1MiB", "1e400GB", "GiB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ValidationError, match="kv_cache_bytes"):
        ServerConfig(kv_cache_bytes=size)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't read"),
        (b"model = ", "isn't TOML"),
        (b'model = "\xff"', "isn't TOML"),
        (b"no_such = 1", "--no-such: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_cant_be_read(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "settings.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(["--config", str(tmp_path / "settings.toml")])
    assert says in str(caught.value)
    with pytest.raises(ConfigError, match=r"can't read .*: Is a directory"):
        read_config(["--config", str(tmp_path)])
