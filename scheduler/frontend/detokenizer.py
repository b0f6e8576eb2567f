"""Token ids of one output to text, token by token. Pure: ids in, text out; knows nothing of stop strings or streams.

What comes out, put together, is what the tokenizer's own `decode` (special tokens left out) says to all ids at once, each
token costing the same however long the output is. Text comes out when no later token can change it: never a part of a
character, and a run of byte tokens (`<0xE2>`) once it has ended, because one bad byte makes the whole run invalid.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import tokenizers

from scheduler.errors import ModelFilesError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ANCHOR = "a"  # a token's text depends on whether something stands before it, not on what


class Detokenizer(Protocol):
    """One output."""

    def step(self, token: int) -> tuple[str, str]:
        """(text of the tokens before, certain only now; text of this token)."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """All text that is certain after these tokens: what `step` would tell of them one by one, in one go."""
        ...

    def flush(self) -> str:
        """The output has ended: text of the tokens before that had been waiting."""
        ...


class DetokenizerTables(Protocol):
    """What all outputs share."""

    def detokenizer(self, prompt: Iterable[int]) -> Detokenizer: ...


def detokenizer_tables(backend: tokenizers.Tokenizer) -> DetokenizerTables:
    """By the tokenizer's decoder. Raises ModelFilesError for one whose text can't be known token by token."""
    chain = _decoder_chain(backend)
    types = [decoder["type"] for decoder in chain]
    if types == ["ByteLevel"]:
        return ByteTable(backend)
    _check_streamable(chain, types)
    return PieceTable(backend, "ByteFallback" in types)


def _decoder_chain(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    def flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
        if decoder["type"] != "Sequence":
            return [decoder]
        return [part for parts in decoder["decoders"] for part in flat(parts)]

    decoder = json.loads(backend.to_str())["decoder"]
    return flat(decoder) if decoder is not None else []


def _check_streamable(chain: list[dict[str, Any]], types: list[str]) -> None:
    for i, decoder in enumerate(chain):
        fused = "Fuse" in types[:i]
        streamable = {
            "Metaspace": not fused,
            "ByteFallback": not fused,
            "WordPiece": not fused,
            "Fuse": True,
            "Replace": not fused or len(decoder.get("pattern", {}).get("String", "")) == 1,
            "Strip": not fused or (decoder.get("start", 0) <= 1 and decoder.get("stop", 0) == 0),
        }
        if not streamable.get(decoder["type"], False):
            raise ModelFilesError(f"the tokenizer's decoder {decoder['type']} can't be used token by token")


def _special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)


# ---------------------------------------------------------------------------------------------------------- byte-level


def byte_alphabet() -> dict[str, int]:
    """The printable character of each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ByteTable(dict[int, bytes]):
    """Token id → its bytes, for byte-level vocabularies; filled as tokens appear."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._alphabet = byte_alphabet()
        self._special = _special_ids(backend)

    def __missing__(self, token: int) -> bytes:
        content = "" if token in self._special else self._backend.id_to_token(token) or ""
        try:
            data = bytes([self._alphabet[character] for character in content])
        except KeyError:  # an added token with its text as it is
            data = content.encode()
        self[token] = data
        return data

    def detokenizer(self, prompt: Iterable[int]) -> Detokenizer:
        return ByteDetokenizer(self)


class ByteDetokenizer:
    """UTF-8, decoded as it comes; what is not UTF-8 becomes replacement characters as in a whole-text decoder."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._begun = b""  # of a character

    def step(self, token: int) -> tuple[str, str]:
        data = self._table[token]
        if self._begun and data and not 0x80 <= data[0] < 0xC0:  # it stays incomplete
            return self.flush(), self._decode(data)
        return "", self._decode(data)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._decode(b"".join(map(self._table.__getitem__, tokens)))

    def flush(self) -> str:
        begun, self._begun = self._begun, b""
        return begun.decode(errors="replace")

    def _decode(self, data: bytes) -> str:
        data = self._begun + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._begun = data[used:]
        return text


# -------------------------------------------------------------------------------------------------------------- pieces


class PieceTable(dict[int, str]):
    """Token id → its text when something stands before it; for all other decoders. Filled as tokens appear."""

    def __init__(self, backend: tokenizers.Tokenizer, byte_fallback: bool) -> None:
        self._backend = backend
        self.decode: Callable[[list[str]], str] = backend.decoder.decode if backend.decoder is not None else " ".join
        self.skipped = _special_ids(backend)
        byte_tokens = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)] if byte_fallback else []
        self.byte_tokens = frozenset(token for token in byte_tokens if token is not None) - self.skipped

    def content(self, token: int) -> str | None:
        """As it stands in the vocabulary; None: not there, or special."""
        return None if token in self.skipped else self._backend.id_to_token(token)

    def after_anchor(self, contents: list[str]) -> str:
        return self.decode([_ANCHOR, *contents])[len(_ANCHOR) :]

    def __missing__(self, token: int) -> str:
        content = self.content(token)
        text = self[token] = "" if content is None else self.after_anchor([content])
        return text

    def detokenizer(self, prompt: Iterable[int]) -> Detokenizer:
        return PieceDetokenizer(self, continues=any(token not in self.skipped for token in prompt))


class PieceDetokenizer:
    """SentencePiece-like: each token has its text; runs of byte tokens wait for their end.

    continues: some text stands before the output.
    """

    def __init__(self, table: PieceTable, continues: bool) -> None:
        self._table = table
        self._started = continues
        self._run: list[str] = []  # byte tokens in a row

    def step(self, token: int) -> tuple[str, str]:
        table = self._table
        if token in table.byte_tokens:
            self._run.append(table.content(token) or "")
            return "", ""
        if not self._run and self._started:
            return "", table[token]
        content = table.content(token)
        if content is None:
            return "", ""
        return self.flush(), self._text([content])

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join([text for token in tokens for text in self.step(token)])

    def flush(self) -> str:
        run, self._run = self._run, []
        return self._text(run) if run else ""

    def _text(self, contents: list[str]) -> str:
        text = self._table.after_anchor(contents) if self._started else self._table.decode(contents)
        self._started = True
        return text
