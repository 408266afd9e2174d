"""What `make docs` adds to the documents: parts that are made, and links that lead out of docs/."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from polygraft.config import ServerConfig
from polygraft.config_text import config_text

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?:deploy|adapters|benchmarks|tests|clients|server)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made, and turn links to files that the site doesn't have into their names."""
    for marker, make in {"<!-- settings -->": settings, "<!-- messages -->": messages}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return OUTSIDE.sub(r"`\1`", markdown)


def settings() -> str:
    """All settings with their defaults, as `polygraft serve --print-config` prints them."""
    return f"```toml\n{config_text(ServerConfig())}\n```\n"


def messages() -> str:
    """All services, messages and enumerations, from the protos' descriptors and comments."""
    parts: list[str] = []
    for file in _descriptors():
        comments = _comments(file)
        for at, service in enumerate(file.service):
            parts += [f"## {service.name}", "", comments.get((6, at), ""), ""]
            for number, method in enumerate(service.method):
                stream = "stream " if method.server_streaming else ""
                call = f"{method.name}({_name(method.input_type)}) → {stream}{_name(method.output_type)}"
                parts.append(f"- `{call}`: {_line(comments.get((6, at, 2, number), ''))}")
            parts.append("")
        for at, message in enumerate(file.message_type):
            parts += [f"## {message.name}", "", comments.get((4, at), ""), ""]
            fields = ((f"`{f.name}`", _type(f), f.number) for f in message.field)
            parts += _table(("field", "type", "number", ""), fields, comments, (4, at, 2))
        for at, enum in enumerate(file.enum_type):
            parts += [f"## {enum.name}", "", comments.get((5, at), ""), ""]
            values = ((f"`{value.name}`", value.number) for value in enum.value)
            parts += _table(("value", "number", ""), values, comments, (5, at, 2))
    return "\n".join(parts)


def _table(
    head: tuple[str, ...],
    rows: Iterable[tuple[object, ...]],
    comments: dict[tuple[int, ...], str],
    path: tuple[int, ...],
) -> list[str]:
    """A table whose last column are the declarations' comments; empty without rows."""
    lines = [
        f"| {' | '.join(map(str, row))} | {_line(comments.get((*path, number), ''))} |"
        for number, row in enumerate(rows)
    ]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""] if lines else []


def _descriptors() -> list[FileDescriptorProto]:
    protos = sorted((ROOT / "protos" / "polygraft_api" / "v1").glob("*.proto"))
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), *map(str, protos)]
        options = ["--include_source_info", f"--descriptor_set_out={out.name}"]
        subprocess.run([*command, *options], check=True)
        return list(FileDescriptorSet.FromString(Path(out.name).read_bytes()).file)


def _comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The comments before declarations, by the path of the declaration in the descriptor."""
    found = {}
    for location in file.source_code_info.location:
        lines = (line.removeprefix(" ").rstrip() for line in location.leading_comments.splitlines())
        # Indented lines are tables.
        found[tuple(location.path)] = "\n".join(
            f"    {line}" if line.startswith(" ") else line for line in lines
        )
    return found


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _name(full: str) -> str:
    return full.rsplit(".", 1)[-1]


def _type(field: Any) -> str:
    name = (
        _name(field.type_name)
        if field.type_name
        else field.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    name = f"[{name}](#{name.lower()})" if field.type_name.startswith(".polygraft.v1.") else f"`{name}`"
    return f"repeated {name}" if field.label == field.LABEL_REPEATED else name
