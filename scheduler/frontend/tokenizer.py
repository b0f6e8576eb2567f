"""The model's own tokenizer: text to token ids, and the tables that turn ids back. No torch, no transformers.

Reads tokenizer.json, which says everything (its post-processor decides about BOS and EOS, as in transformers 5); else
vocab.json and merges.txt, the byte-level BPE of GPT-2 and OPT, with add_bos_token and add_eos_token of tokenizer_config.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from scheduler.errors import ModelFilesError
from scheduler.frontend.detokenizer import Detokenizer, detokenizer_tables
from scheduler.model_files import read_json

log = logging.getLogger(__name__)

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NORMALIZER_SHRINKS = {"NFC": 4, "Prepend": 1}  # UTF-8 bytes in per byte out, at most
_KEEPS_ALL = ("ByteLevel", "Digits", "Metaspace", "Split", "Punctuation")  # pre-tokenizers; the last two unless Removed


class Tokenizer:
    """Thread-safe: nothing changes after loading."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None = None) -> None:
        """Raises ModelFilesError when its decoder can't be streamed."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._tables = detokenizer_tables(backend)
        self.eos_token_id = backend.token_to_id(eos_token) if eos_token is not None else None
        self._bytes_per_token = max_bytes_per_token(backend)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """From the files of a model. Raises ModelFilesError."""
        config = read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # before transformers 4.34 special tokens stood in another file
            config |= read_json(directory / "special_tokens_map.json")
        if (directory / "tokenizer.json").is_file():
            backend = _from_tokenizer_json(directory / "tokenizer.json", config)
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            backend = _from_vocab_and_merges(directory, config)
        else:
            raise ModelFilesError(
                f"{directory} has no tokenizer.json, nor vocab.json and merges.txt: make one with transformers, "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            return cls(backend, _content(config.get("eos_token")))
        except ModelFilesError as error:
            raise ModelFilesError(f"{directory}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Its largest token id and one more."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """Token ids of a prompt, special tokens added as the model's files say. Releases the interpreter while it works."""
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # `encode` would not release it
        encoding: tokenizers.Encoding = batch[0]
        return encoding

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens, special ones left out unless they are wanted."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        """For one output of this prompt: its text goes on where the prompt's ends, so the space between them is not lost."""
        return self._tables.detokenizer(prompt)

    def max_text_bytes(self, num_tokens: int) -> int | None:
        """No text longer than this, in UTF-8 bytes, can have so few tokens. None: this tokenizer may drop text."""
        return None if self._bytes_per_token is None else num_tokens * self._bytes_per_token


# ------------------------------------------------------------------------------------------------------------- loading


def _from_tokenizer_json(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ModelFilesError(f"{path} can't be read: {error}") from None
    _add_special_tokens(backend, config)
    for flag, token, position in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        token_id = backend.token_to_id(_content(config.get(token)) or "")
        adds = token_id is not None and token_id in backend.encode("").ids[position:][:1]
        if config.get(flag) is not None and bool(config[flag]) != adds:
            log.warning("%s %s %s; tokenizer_config.json says otherwise", path, "adds" if adds else "does not add", token)
    return backend


def _from_vocab_and_merges(directory: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the library raises nothing more precise
        raise ModelFilesError(f"{directory}: vocab.json and merges.txt can't be read: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"} | config
    listed = config.get("added_tokens_decoder") or {}
    tokens = [_added_token(listed[index]) for index in sorted(listed, key=int)]
    legacy = read_json(directory / "added_tokens.json")
    tokens += [AddedToken(text, normalized=True) for text in sorted(legacy, key=lambda text: int(legacy[text])) if not listed]
    backend.add_tokens([token for token in tokens if not token.special])
    backend.add_special_tokens([token for token in tokens if token.special])
    _add_special_tokens(backend, config)
    bos = _content(config.get("bos_token")) if config.get("add_bos_token") else None
    eos = _content(config.get("eos_token")) if config.get("add_eos_token") else None
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    single = " ".join([*([bos] if bos else []), "$A", *([eos] if eos else [])])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Those that tokenizer_config.json names are special, whether or not the vocabulary's file says so."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(name) for name in _NAMED] + (list(extra.values()) if isinstance(extra, dict) else list(extra))
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([_added_token(token) for token in named if token and _content(token) not in special])


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(token["content"], special=token.get("special", True), **{name: bool(token.get(name)) for name in flags})


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


# ------------------------------------------------------------------------------------------------ the length of a token


def max_bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """Most UTF-8 bytes of a text that become one token; None when the tokenizer may drop or merge text without a bound.

    A BPE that knows every byte drops nothing, so no token stands for more bytes than its own text has.
    """
    description = json.loads(backend.to_str())
    model, vocabulary = description["model"], backend.get_vocab(with_added_tokens=False)
    shrinks = _normalizer_shrinks(description["normalizer"])
    if model.get("type") != "BPE" or shrinks is None or not _keeps_all(description["pre_tokenizer"]):
        return None
    if '"ByteLevel"' in json.dumps(description["pre_tokenizer"]):
        knows_all_bytes = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    else:
        knows_all_bytes = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    added = backend.get_added_tokens_decoder().values()
    if not knows_all_bytes or any(token.lstrip or token.rstrip for token in added):
        return None
    return shrinks * max(len(text.encode()) for text in backend.get_vocab(with_added_tokens=True))


def _normalizer_shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """Most bytes that a normalizer makes one of; None: unknown."""
    if normalizer is None:
        return 1
    if normalizer["type"] == "Sequence":
        factor = 1
        for part in normalizer["normalizers"]:
            shrinks = _normalizer_shrinks(part)
            if shrinks is None:
                return None
            factor *= shrinks
        return factor
    if normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"]:
        return 1
    return _NORMALIZER_SHRINKS.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(_keeps_all(part) for part in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] in _KEEPS_ALL and pre_tokenizer.get("behavior") != "Removed"
