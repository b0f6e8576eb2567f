"""From what the user calls a model to a directory with its files. No tensors; whether it can be served is found out later."""

from __future__ import annotations

from pathlib import Path

from worker.model_config import ModelError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.json"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in other formats


class ModelNotFoundError(ModelError):
    """Neither a directory nor a model that the hub gives out; the text is one line that says what to do."""


def resolve(model: str, revision: str | None = None) -> Path:
    """An existing directory is itself; else the snapshot of a hub id, from the cache or downloaded into it.

    huggingface_hub does the work, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they always mean. No code
    and no pickles are fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelNotFoundError(f"revision {revision}: {model} is a directory, only a hub id has revisions")
        return path
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file; a checkpoint is a directory with config.json and safetensors files")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    # Imported here, because a local directory should not wait for it.
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except errors.HFValidationError:
        raise ModelNotFoundError(f"{model}: no such directory, and no hub id (owner/name) either") from None
    except errors.GatedRepoError:
        raise ModelNotFoundError(f"{model} is gated: accept its terms on {constants.ENDPOINT} and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        what = f"no such directory, and no model of {constants.ENDPOINT} (or a private one: set HF_TOKEN)"
        raise ModelNotFoundError(f"{model}: {what}") from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{model} has no revision {revision} at {constants.ENDPOINT}") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} can't be reached"
        what = f"no such directory, not (whole) in {constants.HF_HUB_CACHE}, and {why}"
        raise ModelNotFoundError(f"{model}{f' at revision {revision}' if revision else ''}: {what}") from None
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ModelNotFoundError(" ".join(f"{model}: {type(error).__name__}: {error}".split())) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(f"{model} has no safetensors files at {constants.ENDPOINT}; pickled weights are not read")
    return folder
