"""Settings: what an empty one means, tokens, sizes, and the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from pydantic import ValidationError

from polygraft.cli.serve import read_config, settle
from polygraft.config import ServerConfig
from polygraft.config_sources import mistaken_variables
from polygraft.errors import ConfigError
from polygraft.sizes import parse_bytes, shown_bytes

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
        (b"no_such = 1", "settings.toml: no such setting"),
        (b"max-num-seq = 1", "did you mean 'max-num-seqs'"),
        (b"[server]\nmodel = 1", "is a table"),
        (b'config = "x"', "can't name another one"),
        (b"max-num-seqs = 3\nmax_num_seqs = 3", "is the same setting as max-num-seqs"),
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


@pytest.mark.parametrize("key", ["max-num-seqs", "max_num_seqs"])
def test_a_key_may_have_either_spelling(key: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"{key} = 7\n")
    assert read_config(["--config", str(file)]).max_num_seqs == 7


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_an_error_names_where_the_value_came_from(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[str] = []
    file = tmp_path / "settings.toml"
    match source:
        case "flag":
            name, arguments = "--max-num-seqs", ["--max-num-seqs", "0"]
        case "variable":
            name = "POLYGRAFT_MAX_NUM_SEQS"
            monkeypatch.setenv(name, "0")
        case _:
            name, arguments = f"max-num-seqs in {file}", ["--config", str(file)]
            file.write_text("max-num-seqs = 0")
    with pytest.raises(ConfigError) as caught:
        read_config(arguments)
    assert caught.value.flag == name


def test_checks_of_several_settings_name_the_source_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('listen = "nowhere"\nmax_num_batched_tokens = 2\n')
    with pytest.raises(ConfigError, match=f"^listen in {file}: expected HOST:PORT"):
        read_config(["--config", str(file)])
    monkeypatch.setenv("POLYGRAFT_MAX_NUM_SEQS", "3")
    with pytest.raises(
        ConfigError, match=r"^max_num_batched_tokens in .* is less than POLYGRAFT_MAX_NUM_SEQS 3"
    ):
        read_config(["--config", str(file), "--listen", "127.0.0.1:0"])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(typer.Exit) as caught:
        read_config([*arguments, "--print-config"])
    assert caught.value.exit_code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYGRAFT_ADMIN_TOKEN", SECRET)
    monkeypatch.setenv("POLYGRAFT_MAX_STEP_MS", "2.5")
    (tmp_path / "first.toml").write_text('lora-path = "auto"\nmetrics = "off"\n')
    arguments = ["--config", str(tmp_path / "first.toml"), "--adapters", str(tmp_path), "--no-prefix-caching"]
    arguments += ["--kv-cache-bytes", "1.5GiB", "--threads", "3", "--served-model-name", 'a "name"']
    text = printed(capsys, *arguments)
    assert SECRET not in text
    assert "# admin-token is set by POLYGRAFT_ADMIN_TOKEN, and isn't shown" in text
    assert "\nprefix-caching = false  # from --no-prefix-caching\n" in text
    assert "\nmax-step-ms = 2.5  # from POLYGRAFT_MAX_STEP_MS\n" in text
    assert f'\nlora-path = "auto"  # from lora-path in {tmp_path / "first.toml"}\n' in text
    second = tmp_path / "second.toml"
    second.write_text(text)
    monkeypatch.delenv("POLYGRAFT_MAX_STEP_MS")
    before, after = (
        config.model_dump(exclude={"config"})
        for config in (
            read_config([*arguments, "--max-step-ms", "2.5"]),
            read_config(["--config", str(second)]),
        )
    )
    assert before == after


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "1234"),
        ("--model", "true"),
        ("--served-model-name", "²"),
        ("--served-model-name", "😀 é"),
        ("--served-model-name", '"\\u0041"\x7f\t'),
        ("--unread-timeout", "86400.25"),
        ("--max-step-ms", "1234567"),
        ("--max-step-ms", "inf"),
        ("--max-step-ms", "1e-9"),
        ("--max-adapter-bytes", "12345"),
        ("--max-num-batched-tokens", "12345678"),
    ],
)
def test_a_value_is_printed_exactly(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(printed(capsys, option, value))
    name = option.removeprefix("--").replace("-", "_")
    given, read = read_config([option, value]), read_config(["--config", str(file)])
    assert getattr(read, name) == getattr(given, name)


@pytest.mark.parametrize("folder", ["a\nb", "a\x07b"])
def test_a_files_name_never_breaks_the_printed_comment(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).mkdir()
    first, second = tmp_path / folder / "first.toml", tmp_path / "second.toml"
    first.write_text("max-num-seqs = 4")
    second.write_text(printed(capsys, "--config", str(first)))
    assert read_config(["--config", str(second)]).max_num_seqs == 4


def test_a_path_that_toml_cant_hold_is_refused(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(folder).mkdir()
    with pytest.raises(ConfigError, match="--adapters: isn't Unicode"):
        read_config(["--adapters", folder, "--print-config"])


def test_a_printed_configuration_warns_of_nearly_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYGRAFT_MAX_NUM_SEQ", "3")
    with pytest.raises(typer.Exit):
        read_config(["--print-config"])
    shown = capsys.readouterr()
    assert "did you mean POLYGRAFT_MAX_NUM_SEQS?" in shown.err
    assert "POLYGRAFT_MAX_NUM_SEQ " not in shown.out


def test_the_example_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Path(__file__).parents[1] / "deploy" / "polygraft.toml"
    assert printed(capsys) == example.read_text(), (
        "run `polygraft serve --print-config > deploy/polygraft.toml`"
    )
    every = {name.replace("_", "-") for name in ServerConfig.model_fields} - {"config"}
    assert {line[2:].split(" =")[0] for line in example.read_text().splitlines() if " =" in line} == every
    assert read_config(["--config", str(example)]).model_dump(exclude={"config"}) == read_config(
        []
    ).model_dump(exclude={"config"})


def test_nearly_a_variable_is_warned_about() -> None:
    environment = ["POLYGRAFT_MAX_NUM_SEQ", "POLYGRAFT_CACHE", "POLYGRAFT_SERVER", "POLYGRAFT_MODEL", "PATH"]
    environment += ["POLYGRAFT_SERVICE_HOST", "POLYGRAFT_PORT", "POLYGRAFT_PORT_50051_TCP", "POLYGRAFT_ELSE"]
    assert mistaken_variables(ServerConfig.model_fields, environment) == [
        "POLYGRAFT_MAX_NUM_SEQ is not a setting and is ignored; did you mean POLYGRAFT_MAX_NUM_SEQS?"
    ]


@pytest.mark.parametrize("count", [0, 1, 1000, 2**10, 3 * 2**20, 2**30, 10**9])
def test_sizes_are_read_as_they_are_shown(count: int) -> None:
    assert int(parse_bytes(shown_bytes(count))) == count
