"""Where a model's small files are: a directory as it is, or those files of a hub id, fetched into the hub's cache.

Configuration and tokenizer only; weights are the worker's affair. Imports the hub's client only when a hub id is given.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from scheduler.errors import ModelFilesError, ModelNotFoundError

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory that holds config.json and the tokenizer of `model`. Raises ModelNotFoundError."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ModelNotFoundError(f"{model} is a directory, so it has no revision {revision}: only hub ids have")
        if not (directory / "config.json").is_file():
            raise ModelNotFoundError(f"{model} is not a model: it has no config.json")
        return directory.absolute()
    if directory.exists() or not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(f"no directory {model}, and not a hub id (like organisation/name)")
    return _from_hub(model, revision)


def fingerprint(directory: Path) -> str:
    """Of configuration and tokenizer: what the ids of a prompt mean, and to which kind of model. Weights are not looked at."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("config.json", "tokenizer.json"):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except GatedRepoError:
        raise ModelNotFoundError(f"{model} is gated on the hub: accept its terms there and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"the hub's {model} has no revision {revision}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelNotFoundError(f"no directory {model}, and the hub has no such model (private ones need HF_TOKEN)") from None
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"no directory {model}; the hub can't be reached, and {model} is not in its cache (HF_HOME)"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(f"{model} can't be fetched from the hub: {' '.join(str(error).split())}") from None
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(f"the hub's {model} is not a model: it has no config.json")
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file. Raises ModelFilesError when it is malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is not a JSON object")
    return content
