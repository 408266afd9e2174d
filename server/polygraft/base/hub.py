"""Fetches models from the Hugging Face hub, or finds them in its cache on this machine."""

from __future__ import annotations

import functools
import logging
import threading

from polygraft.errors import BaseModelError
from polygraft.stages import reminders

log = logging.getLogger(__name__)

WHOLE = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Files of a model: configuration, weights, tokenizer. Pickles and code are never fetched."""
CONFIGURATION = ("*.json",)
_SECONDS = 5.0
"""How long the hub may take to answer a look-up. After that, its cache on this machine is used."""


@functools.cache  # checking an adapter asks several times, and each look-up may take seconds
def hub_folder(model: str, files: tuple[str, ...] = WHOLE) -> str:
    """Return the folder of a model on the hub, downloaded unless this machine has its newest version.

    If the hub can't be reached, the version on this machine is used.

    Args:
        files: patterns of the files to fetch.

    Raises:
        BaseModelError: there is no such model, it isn't open to this user, or neither the hub nor the cache
            has it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    log.info("looking up %s on the model hub", model)
    try:
        with reminders(f"fetching {model}", log.info):
            return snapshot_download(
                model,
                allow_patterns=list(files),
                ignore_patterns=["consolidated*", "*/*"],
                etag_timeout=_SECONDS,
                local_files_only=constants.HF_HUB_OFFLINE or not _answers(model),
            )
    except GatedRepoError as error:
        raise BaseModelError(
            f"{model}: accept its licence on the hub's page, and set HF_TOKEN to a token of your account"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"{model}: no such folder here, and no such model on the hub; for a private one set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"{model}: no such folder here, not in the hub's cache ({constants.HF_HUB_CACHE}), and the hub "
            f"{'is switched off by HF_HUB_OFFLINE' if constants.HF_HUB_OFFLINE else 'cannot be reached'}. "
            "Connect to it once, name a local folder, or serve `--model default`"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise BaseModelError(f"{model}: can't be fetched from the hub: {error}") from error


def _answers(model: str) -> bool:
    """Whether the hub answers a look-up in time.

    `snapshot_download` waits for the answer without a limit. The timeout of a connection bounds neither the
    look-up of the hub's name nor the attempts at all of its addresses, so a separate thread asks.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    answers: list[bool] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, timeout=_SECONDS)
        except (HfHubHTTPError, HFValidationError):
            answers.append(True)  # a refusal, which the download explains
        except Exception as error:  # noqa: BLE001 - each transport has its own classes
            log.info("the model hub can't be reached: %s", error)
        else:
            answers.append(True)

    asking = threading.Thread(target=ask, name="hub look-up", daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return bool(answers)
