"""Measure the checkpoint in demo/model: `python -m demo.evaluate` prints the tables that stand in demo/README.md.

Everything is measured on the held-out files of demo/corpus.py, with the saved bf16 checkpoint as transformers loads it.
"""

import argparse
import ast
import io
import json
import lzma
import math
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from demo.corpus import Corpus, SourceFile, load_corpus
from demo.ngram import Counts, Ints, NGram
from demo.train import MODEL, RECORD, VOCABULARY

CONTEXTS = (256, 1_024, 2_048)
SCORED_CONTEXT = 1_024  # the figure that is compared with the baseline

NUM_PROMPTS = 50
NEW_TOKENS = 96
PROMPT_LINES = 40

# The baseline as `--choose-ngram` found it on the tuning files.
NGRAM_UNIT = "token"
NGRAM_ORDER = 7
NGRAM_CHOICES = (("token", 3), ("token", 4), ("token", 5), ("token", 6), ("token", 7), ("byte", 7), ("byte", 9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose-ngram", action="store_true", help="compare the baseline's settings on the tuning files")
    parser.add_argument("--show", action="store_true", help="print the greedy continuations as well")
    arguments, _ = parser.parse_known_args()
    corpus = load_corpus()
    if RECORD.exists() and json.loads(RECORD.read_text())["corpus_sha256"] != corpus.digest():
        print("This standard library is not the one the checkpoint was trained on: the figures will differ.\n")
    if arguments.choose_ngram:
        choose_ngram(corpus)
        return
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    print_compression(corpus, model, tokenizer)
    print_continuations(corpus, model, tokenizer, arguments.show)


# ------------------------------------------------------------------------------------------------------ bits per byte


def num_bytes(files: Sequence[SourceFile]) -> int:
    return sum(len(file.text.encode()) for file in files)


def model_bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, files: Sequence[SourceFile], context: int) -> float:
    """Each file from its first byte, BOS before it. A token is scored after context / 2 .. context - 1 others."""
    bits = sum(file_bits(model, tokenizer.encode(file.text).ids, context) for file in files)
    return bits / num_bytes(files)


@torch.inference_mode()
def file_bits(model: LlamaForCausalLM, ids: Sequence[int], context: int) -> float:
    """-log2 of the probability of ids[1:]; windows of `context` tokens, each half a window further on."""
    nats, scored = 0.0, 1
    for start in range(0, max(1, len(ids) - context // 2), context // 2):
        window = torch.tensor(ids[start : start + context])
        chances = model(input_ids=window[None, :-1]).logits[0].float().log_softmax(-1)
        each = chances.gather(1, window[1:, None])[:, 0]
        nats -= float(each[scored - start - 1 :].sum())
        scored = start + len(window)
    assert scored == len(ids)
    return nats / math.log(2)


def symbols(files: Sequence[SourceFile], unit: str, tokenizer: Tokenizer) -> tuple[Ints, Ints, int]:
    """The files as one stream of tokens or bytes, the mark that begins each file, and the size of the alphabet."""
    if unit == "token":
        stream = [token for file in files for token in tokenizer.encode(file.text).ids]
        return np.array(stream), np.array(stream[0]), VOCABULARY
    return np.array([symbol for file in files for symbol in (256, *file.text.encode())]), np.array(256), 257


def ngram_bits_per_byte(model: NGram, files: Sequence[SourceFile], unit: str, tokenizer: Tokenizer) -> float:
    stream, begin, _ = symbols(files, unit, tokenizer)
    return float(model.bits(stream)[stream != begin].sum()) / num_bytes(files)


def count_ngrams(files: Sequence[SourceFile], unit: str, order: int, tokenizer: Tokenizer) -> Counts:
    stream, _, alphabet = symbols(files, unit, tokenizer)
    return Counts(stream, alphabet, order)


def choose_ngram(corpus: Corpus) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    size = (MODEL / "model.safetensors").stat().st_size
    print("| unit | order | n-grams kept | size | bits per byte, tuning files |\n| --- | ---: | ---: | ---: | ---: |")
    for unit, order in NGRAM_CHOICES:
        model = count_ngrams(corpus.train, unit, order, tokenizer).pruned_to(size)
        bits = ngram_bits_per_byte(model, corpus.tuning, unit, tokenizer)
        print(f"| {unit} | {order} | {model.entries:,} | {model.packed_size:,} | {bits:.3f} |", flush=True)


def print_compression(corpus: Corpus, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    files, size = corpus.held_out, (MODEL / "model.safetensors").stat().st_size
    print(f"{len(files)} held-out files, {num_bytes(files):,} bytes\n")
    print("| | size, bytes | bits per byte |\n| --- | ---: | ---: |")
    for context in CONTEXTS:
        bits = model_bits_per_byte(model, tokenizer, files, context)
        name = f"this checkpoint, windows of {context:,} tokens"
        print(f"| {f'**{name}**' if context == SCORED_CONTEXT else name} | {size:,} | {bits:.3f} |", flush=True)
    for order in (NGRAM_ORDER, 3, 1):
        ngram = count_ngrams(corpus.train, NGRAM_UNIT, order, tokenizer).pruned_to(size)
        bits = ngram_bits_per_byte(ngram, files, NGRAM_UNIT, tokenizer)
        name = f"{order}-gram, modified Kneser-Ney"
        print(f"| {f'**{name}**' if order == NGRAM_ORDER else name} | {ngram.packed_size:,} | {bits:.3f} |", flush=True)
    for name, bits in compressors(corpus):
        print(f"| {name} | | {bits:.3f} |", flush=True)


def compressors(corpus: Corpus) -> Iterator[tuple[str, float]]:
    """What general compressors make of the held-out files laid end to end."""
    text = b"".join(file.text.encode() for file in corpus.held_out)
    before = b"".join(file.text.encode() for file in corpus.train)
    yield "xz -9 that has read the training files", _xz_bits(before + text, text) - _xz_bits(before, text)
    yield "xz -9", _xz_bits(text, text)
    yield "gzip -9", 8 * len(zlib.compress(text, 9)) / len(text)


def _xz_bits(data: bytes, scored: bytes) -> float:
    return 8 * len(lzma.compress(data, preset=9)) / len(scored)


# ------------------------------------------------------------------------------------------------------ continuations


@dataclass(frozen=True)
class Verdict:
    """`passes`: nothing wrong but the cut at the end. `strict`: no complaint at all, so nothing is left open either."""

    passes: bool
    strict: bool
    complaint: str


def choose_prompts(files: Sequence[SourceFile]) -> list[str]:
    """NUM_PROMPTS texts that end after a function's header, evenly spaced over all functions of the files."""
    found = [prompt for file in files for prompt in function_prompts(file.text)]
    return [found[index * len(found) // NUM_PROMPTS] for index in range(NUM_PROMPTS)]


def function_prompts(text: str) -> Iterator[str]:
    """For each function: its header, and what stands before it back to the start of a statement, PROMPT_LINES at most.

    The text begins at indentation 0 or 4, so that every later line has an outer level to return to.
    """
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    starts = sorted(_first_line(node) for node in [*nodes, *tree.body] if node.col_offset in (0, 4))
    for node in sorted(nodes, key=lambda node: node.lineno):
        body = node.body[0].lineno
        if isinstance(node, ast.ClassDef) or body == node.lineno:
            continue
        start = next((line for line in starts if body - PROMPT_LINES <= line <= node.lineno), node.lineno)
        prompt = "".join(lines[start - 1 : body - 1])
        if judge(prompt, ended=True).passes:
            yield prompt


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def judge(text: str, ended: bool) -> Verdict:
    """Run Python's tokenizer over the text.

    ended: the model ended the text itself, with EOS. Otherwise the text stops where we cut it, and "end of file inside
    a bracket or a triple-quoted string" is our doing, not the model's.
    """
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.ERRORTOKEN:  # up to Python 3.11; later versions raise
                return Verdict(False, False, f"error token {token.string!r}")
    except (tokenize.TokenError, SyntaxError) as error:
        complaint = str(error)
        cut = "EOF in multi-line" in complaint or "unterminated triple-quoted" in complaint
        return Verdict(cut and not ended, False, complaint)
    return Verdict(True, True, "")


@torch.inference_mode()
def continue_greedily(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> tuple[str, bool]:
    """The continuation, and whether the model ended it. What the budget cut loses its last, incomplete line."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
    text = tokenizer.decode(output.tolist(), skip_special_tokens=True)
    if int(output[-1]) == model.config.eos_token_id:
        return text, True
    return text[: text.rfind("\n") + 1], False


def print_continuations(corpus: Corpus, model: LlamaForCausalLM, tokenizer: Tokenizer, show: bool) -> None:
    passed = strict = ended = 0
    for number, prompt in enumerate(choose_prompts(corpus.held_out), start=1):
        text, by_model = continue_greedily(model, tokenizer, prompt)
        # Not one complete line: there is nothing to judge, and that is no pass.
        verdict = judge(prompt + text, by_model) if text.strip() else Verdict(False, False, "no complete line")
        passed, strict, ended = passed + verdict.passes, strict + verdict.strict, ended + by_model
        if show:
            print(f"--- {number}: {verdict}\n{''.join(prompt.splitlines(keepends=True)[-3:])}>>>\n{text}")
        elif not verdict.passes:
            print(f"prompt {number} fails: {verdict.complaint}")
    print(f"\n{NUM_PROMPTS} greedy continuations of {NEW_TOKENS} tokens at most: {passed} pass Python's tokenizer,")
    print(f"{strict} of them with nothing left open at the cut. {ended} were ended by the model.")


if __name__ == "__main__":
    main()
