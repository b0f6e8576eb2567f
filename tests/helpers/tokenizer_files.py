"""Small tokenizers of the kinds that checkpoints bring, as directories of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog. naïve café, 東京, 🦊🦊 — fin.\n",
    "import os, sys\nfor name in os.listdir('.'):\n    print(name, file=sys.stderr)\n",
]


def byte_level(vocab_size: int = 400, **byte_level_options: Any) -> Tokenizer:
    """GPT-2's and Llama 3's kind, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **byte_level_options)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece_like(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """Llama 2's kind: ▁ for spaces, byte tokens for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.,é",
        "▁▁",
        "th",
        "▁th",
        "▁the",
    ]:
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "▁"), ("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def legacy_sentencepiece_like() -> Tokenizer:
    """The same as converters of transformers 4 wrote it: spaces handled by a normalizer."""
    tokenizer = sentencepiece_like()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def words() -> Tokenizer:
    """Whole words, no decoder."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "fox", "dog", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, config: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
    """tokenizer.json, tokenizer_config.json, config.json; `files` by their names without .json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    _write(directory, {"config": {"model_type": "llama"}, "tokenizer_config": named} | files)
    return directory


def save_vocab_and_merges(directory: Path, config: dict[str, Any]) -> Path:
    """OPT's files: vocab.json, merges.txt, tokenizer_config.json, no tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    byte_level().model.save(str(directory))
    _write(directory, {"config": {"model_type": "opt"}, "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"} | config})
    return directory


def _write(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
