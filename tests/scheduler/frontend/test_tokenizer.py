"""The same ids as transformers from the same files, without transformers; and what is said about files that can't be used."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from scheduler.errors import ModelFilesError
from scheduler.frontend.tokenizer import Tokenizer, max_bytes_per_token
from tests.helpers import tokenizer_files as files

TEXTS = [
    "",
    " ",
    "a",
    "The quick  brown fox",
    " leading and trailing ",
    "def f(x):\n\treturn x ** 2\n",
    "naïve café 東京 🦊",
    "a</s>b<s>c <pad>",
    "\ud7ff\ue000 \u0000 \u200b",
]
KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": files.byte_level,
    "byte level with BOS": lambda: files.with_bos(files.byte_level()),
    "SentencePiece-like": files.sentencepiece_like,
    "SentencePiece-like with BOS": lambda: files.with_bos(files.sentencepiece_like()),
    "legacy SentencePiece-like with BOS": lambda: files.with_bos(files.legacy_sentencepiece_like()),
    "words": files.words,
}


def assert_same_as_transformers(directory: Path) -> None:
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        token_ids = ours.encode(text).ids
        assert token_ids == theirs(text)["input_ids"], text
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True), text
    assert ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_gives_the_ids_of_transformers(kind: str, flags: dict[str, Any], tmp_path: Path) -> None:
    """Its post-processor decides about BOS and EOS, whatever tokenizer_config.json says."""
    assert_same_as_transformers(files.save(KINDS[kind](), tmp_path, flags))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_llama_classes_give_the_ids_of_transformers(name: str, tmp_path: Path) -> None:
    assert_same_as_transformers(files.save(files.with_bos(files.sentencepiece_like()), tmp_path, {"tokenizer_class": name}))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True},
        {"add_bos_token": True, "pad_token": "<pad>", "unk_token": "</s>"},
    ],
)
def test_vocab_and_merges_give_the_ids_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    assert_same_as_transformers(files.save_vocab_and_merges(tmp_path, named | config))


def test_opt_begins_prompts_with_its_own_bos(tmp_path: Path) -> None:
    """As facebook/opt-* is written: AddedToken dictionaries, `</s>` as BOS."""
    token = {
        "__type": "AddedToken",
        "content": "</s>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    config = {"add_bos_token": True, "bos_token": token, "eos_token": token, "unk_token": token}
    tokenizer = Tokenizer.load(files.save_vocab_and_merges(tmp_path, config))
    token_ids = tokenizer.encode("fox").ids
    assert token_ids[0] == tokenizer.eos_token_id == files.byte_level().token_to_id("</s>")
    assert tokenizer.decode(token_ids) == "fox"


def test_special_tokens_of_the_old_map_file_are_special(tmp_path: Path) -> None:
    directory = files.save_vocab_and_merges(tmp_path, {})
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("a</s>b").ids) == "ab"
    assert_same_as_transformers(directory)


def test_truncation_and_padding_written_into_the_file_do_not_act(tmp_path: Path) -> None:
    backend = files.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = Tokenizer.load(files.save(backend, tmp_path))
    assert tokenizer.encode("The quick brown fox").ids == files.byte_level().encode("The quick brown fox").ids
    assert tokenizer.encode("fox " * 50).ids == files.byte_level().encode("fox " * 50).ids


def test_no_tokenizer_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"AutoTokenizer.*save_pretrained") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json can't be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ModelFilesError, match=r"vocab\.json and merges\.txt can't be read"):
        Tokenizer.load(tmp_path)


def test_a_decoder_that_can_not_be_streamed_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="decoder CTC"):
        Tokenizer.load(files.save(files.sentencepiece_like(decoders.CTC()), tmp_path))


def test_a_flag_that_the_post_processor_contradicts_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tokenizer.load(files.save(files.with_bos(files.byte_level()), tmp_path / "agrees", {"add_bos_token": True}))
    assert not caplog.records
    Tokenizer.load(files.save(files.byte_level(), tmp_path / "contradicts", {"add_bos_token": True}))
    assert "does not add bos_token" in caplog.text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "words"])
def test_no_text_has_fewer_tokens_than_its_bytes_need(kind: str) -> None:
    backend = KINDS[kind]()
    longest = max_bytes_per_token(backend)
    assert longest is not None
    rng = random.Random(5)
    vocabulary = list(backend.get_vocab())
    for _ in range(300):
        pieces = [
            rng.choice([rng.choice(vocabulary), " ", "   ", "é", "🦊", "e\u0301", "\n"]) for _ in range(rng.randint(0, 30))
        ]
        text = "".join(pieces)
        assert len(text.encode()) <= longest * len(backend.encode(text).ids)


def test_normalizers_that_shorten_text_are_reckoned_with() -> None:
    backend = files.byte_level()
    plain = max_bytes_per_token(backend)
    backend.normalizer = normalizers.NFC()
    longest = max_bytes_per_token(backend)
    assert plain is not None and longest is not None and longest > plain
    for text in ("e\u0301" * 50, "\u212a" * 50, "\u1112\u1161\u11ab" * 50, "\u03b1\u0313\u0300\u0345" * 50):
        assert len(text.encode()) <= longest * len(backend.encode(text).ids)


def _with(change: Callable[[Backend], object]) -> Backend:
    backend = files.byte_level()
    change(backend)
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        files.words(),
        _with(lambda backend: setattr(backend, "normalizer", normalizers.Strip())),
        _with(lambda backend: backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])),
        _with(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace())),
        _with(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(" ", "removed"))),
    ],
    ids=["words", "strip", "lstrip", "whitespace", "split"],
)
def test_no_bound_is_given_where_text_may_be_dropped(backend: Backend) -> None:
    assert max_bytes_per_token(backend) is None


def test_tokenizing_leaves_the_interpreter_to_others() -> None:
    """The event loop goes on while a long prompt is tokenized: this thread gets many turns before the other one is done."""
    tokenizer = Tokenizer(files.byte_level())
    text = files.TEXT[0] * 20_000
    done = threading.Event()

    def work() -> None:
        tokenizer.encode(text)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not done.wait(0.001):  # each takes the interpreter anew
        turns += 1
    thread.join()
    assert turns >= 20
