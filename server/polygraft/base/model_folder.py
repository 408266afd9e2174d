"""Finds the model that `--model` names: the default model, a local folder, or a model on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from polygraft.base.default_model import HUB_ID, ensure_default_model
from polygraft.base.hub import hub_folder
from polygraft.errors import BaseModelError

DEFAULT = "default"
DEFAULT_NAME = HUB_ID.rpartition("/")[2]
CONFIGURATION = "config.json"


def resolve_model(model: str) -> str:
    """Return the model's folder; make the default model or fetch one from the hub if necessary.

    Raises:
        BaseModelError: there is no such model, or it can't be read, fetched or converted.
    """
    if model == DEFAULT:
        return str(ensure_default_model())
    found = locate(model)
    return found if Path(found).is_dir() else hub_folder(found)


def locate(model: str) -> str:
    """Return the local folder, or the name itself if there is no such folder and it could be a hub id.

    Raises:
        BaseModelError: it can only be a path, and there is no model there.
    """
    folder = Path(model).expanduser() if model.startswith("~") else Path(model)
    try:
        if folder.is_dir():
            os.listdir(folder)  # for its PermissionError
            if not (folder / CONFIGURATION).is_file():
                raise BaseModelError(f"{model}: the folder has no {CONFIGURATION}, so it holds no model")
            with (folder / CONFIGURATION).open("rb"):
                return str(folder)
        if folder.exists():
            raise BaseModelError(f"{model}: is a file; name the folder that holds {CONFIGURATION}")
    except PermissionError as error:
        raise BaseModelError(f"{model}: can't be read by this user: {error.filename}") from error
    except OSError as error:
        raise BaseModelError(f"{model}: {error.strerror}") from error
    if could_be_hub_id(model):
        return model
    raise BaseModelError(f"{model}: no such folder")


def could_be_hub_id(model: str) -> bool:
    """Whether a name has the form NAME or OWNER/NAME and isn't written as a path."""
    parts = model.split("/")
    return len(parts) <= 2 and all(parts) and parts[0] not in ("~", ".", "..")


def shown_name(model: str) -> str:
    """Return the name for clients and metrics: the hub id, or a folder's name without its path."""
    if model == DEFAULT:
        return DEFAULT_NAME
    folder = Path(model).expanduser() if model.startswith("~") else Path(model)
    return folder.resolve().name if folder.is_dir() else model
