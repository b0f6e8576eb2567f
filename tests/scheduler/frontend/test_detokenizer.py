"""Text token by token is the text of all tokens at once, for each kind of decoder, however wild the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from scheduler.frontend.detokenizer import byte_alphabet
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers import tokenizer_files as files


def _backends() -> dict[str, Backend]:
    found = {
        "byte level": files.byte_level(),
        "Llama": files.sentencepiece_like(),
        "Gemma": files.sentencepiece_like(
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        ),
        "Metaspace always": files.sentencepiece_like(decoders.Metaspace(prepend_scheme="always")),
        "Metaspace first": files.sentencepiece_like(decoders.Metaspace(prepend_scheme="first")),
        "Metaspace never": files.sentencepiece_like(decoders.Metaspace(prepend_scheme="never")),
        "WordPiece": files.sentencepiece_like(decoders.WordPiece("▁")),
        "words": files.words(),
    }
    for backend in found.values():
        backend.add_tokens(["<tool call>", " naïve "])
    return found


TOKENIZERS = {kind: (backend, Tokenizer(backend)) for kind, backend in _backends().items()}
BYTE_TEXTS = ["é", "東", "🦊", "a", "\n", "e\u0301"]


def token_lists(backend: Backend) -> st.SearchStrategy[list[int]]:
    """Any ids, also unknown and special ones; and characters made of byte tokens, whole or cut."""
    size = backend.get_vocab_size()
    single = st.integers(0, size + 3).map(lambda token: [token])

    def as_bytes(cut: tuple[str, int]) -> list[int]:
        text, length = cut
        tokens = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()[:length]]
        return [token for token in tokens if token is not None]

    cut_characters = st.tuples(st.sampled_from(BYTE_TEXTS), st.integers(1, 4)).map(as_bytes)
    return st.lists(st.one_of(single, cut_characters), max_size=12).map(
        lambda parts: [token for part in parts for token in part]
    )


def incremental(tokenizer: Tokenizer, token_ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return ["".join(detokenizer.step(token)) for token in token_ids] + [detokenizer.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_are_the_whole_text(kind: str, data: st.DataObject) -> None:
    backend, tokenizer = TOKENIZERS[kind]
    token_ids = data.draw(token_lists(backend))
    assert "".join(incremental(tokenizer, token_ids)) == backend.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_many_tokens_at_once_are_their_text_one_by_one(kind: str, data: st.DataObject) -> None:
    backend, tokenizer = TOKENIZERS[kind]
    parts = data.draw(st.lists(token_lists(backend), max_size=4))
    detokenizer = tokenizer.detokenizer(())
    text = "".join([detokenizer.decode(part) for part in parts]) + detokenizer.flush()
    assert text == "".join(incremental(tokenizer, [token for part in parts for token in part]))


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_output_goes_on_where_the_prompt_ended(kind: str, data: st.DataObject) -> None:
    """Prompt and output, decoded together, are the prompt's text and the output's: no space is lost between them."""
    backend, tokenizer = TOKENIZERS[kind]
    word = backend.token_to_id("the") or backend.token_to_id("a")
    token_ids = data.draw(token_lists(backend))
    whole = backend.decode([word, *token_ids], skip_special_tokens=True)
    assert backend.decode([word]) + "".join(incremental(tokenizer, token_ids, (word,))) == whole


@pytest.mark.parametrize("text", ["naïve café 東京 🦊🦊 — fin", "\U0001f468\u200d\U0001f469\u200d\U0001f467"])
def test_characters_come_whole_and_as_soon_as_they_are(text: str) -> None:
    backend, tokenizer = TOKENIZERS["byte level"]
    token_ids = backend.encode(text).ids
    pieces = incremental(tokenizer, token_ids)
    alphabet, data, sent = byte_alphabet(), b"", ""
    for token, piece in zip(token_ids, pieces[:-1], strict=True):
        data += bytes(alphabet[character] for character in backend.id_to_token(token))
        sent += piece
        assert sent == data.decode(errors="ignore")  # all but the incomplete character at the end
    assert sent == text and pieces[-1] == ""


def test_what_an_incomplete_character_leaves_belongs_to_the_tokens_before() -> None:
    backend, tokenizer = TOKENIZERS["byte level"]
    first_byte, letter = backend.token_to_id("Ã"), backend.token_to_id("a")  # 0xC3
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.step(first_byte) == ("", "")
    assert detokenizer.step(letter) == ("\N{REPLACEMENT CHARACTER}", "a")


def test_runs_of_byte_tokens_wait_for_their_end() -> None:
    backend, tokenizer = TOKENIZERS["Llama"]
    fox = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    detokenizer = tokenizer.detokenizer([backend.token_to_id("a")])
    assert [detokenizer.step(token) for token in fox] == [("", "")] * 4
    assert detokenizer.step(backend.token_to_id("a")) == ("🦊", "a")
    detokenizer.step(fox[0])
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_prompt_of_special_tokens_is_no_text_to_go_on_from() -> None:
    backend, tokenizer = TOKENIZERS["Llama"]
    bos, the = backend.token_to_id("<s>"), backend.token_to_id("▁the")
    assert "".join(incremental(tokenizer, [the, the], (bos,))) == "the the"
    assert "".join(incremental(tokenizer, [the, the], (bos, the))) == " the the"
