"""Make the bundled checkpoint: corpus, tokenizer, training, files. `python -m demo.train` from the repository root.

Everything is a fixed number of steps from a fixed seed, never a time budget. What the finished checkpoint is worth is
measured elsewhere, by demo/evaluate.py (`python -m demo.train --evaluate` calls it).
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import Corpus, SourceFile, functions, load_corpus

HERE = Path(__file__).parent
MODEL = HERE / "model"
RECORD = HERE / "training.json"

BOS, EOS, USER, ASSISTANT, PAD = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, PAD]
VOCABULARY = 4_096

# One alternative per line: blank lines with the newline and the indentation that follows; a word with the space, dot
# or underscores before it; up to three digits; punctuation; whatever white space is left. Nothing is lost or changed.
SPLIT = (
    r"(?:[ \t]*\r?\n)+[ \t]*"
    r"|[ ._]?_*\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)

# Whatever is not the assistant speaks as the user: the model has seen no system turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps over windows of `length` tokens; every step sees TOKENS_PER_STEP of them."""

    steps: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide the result. Rates were chosen on the tuning files, never on the held-out ones."""

    seed: int
    phases: tuple[Phase, ...]
    warmup_steps: int
    constant_share: float  # of all steps; the rate then falls to zero in a straight line
    matrix_rate: float  # Muon, scaled to the RMS of an AdamW update
    other_rate: float  # AdamW: embedding and norms
    matrix_decay: float = 0.05
    cut_texts: bool = False

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


# Short windows are a fifth cheaper per token, attention being quadratic; the long ones teach the context.
WHOLE_TEXTS = Recipe(
    seed=2_026,
    phases=(Phase(800, 256), Phase(600, 512), Phase(500, 1_024)),
    warmup_steps=30,
    constant_share=0.3,
    matrix_rate=1.2e-2,
    other_rate=1e-2,
)
# A prompt ends where its writer stopped, often within what the vocabulary holds as one token: after a line break, say,
# whose token would have held the next line's indentation too. From whole texts alone the model learns that a bare line
# break means the end of the file. So it goes on, briefly, with texts cut as prompts are.
CUT_TEXTS = Recipe(
    seed=2_027,
    phases=(Phase(300, 1_024),),
    warmup_steps=20,
    constant_share=0.0,
    matrix_rate=4e-3,
    other_rate=3e-3,
    cut_texts=True,
)

TOKENS_PER_STEP = 4_096
PARTS = 4  # of a step's batch, whatever the number of threads: the result depends on it, the cache likes it small
CHAT_SHARE = 0.3  # of the functions with a docstring, drawn anew in every epoch: summary -> function
ALONE_SHARE = 0.1  # of the functions without one: a document that is a function and nothing else

CUTS_PER_LINE_START = 0.04  # the chance that a text is cut before a line, and somewhere within it
CUTS_PER_LINE = 0.02


def llama_config() -> LlamaConfig:
    """5.48 M parameters, 10.95 MB in bf16. Two query heads share a KV head, so the demo walks the GQA path."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2_048,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        initializer_range=0.02,
    )


def train_tokenizer(files: tuple[SourceFile, ...]) -> Tokenizer:
    """A byte-level BPE: every text comes back exactly as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


class Documents:
    """The training texts as token ids, and windows of them without end."""

    def __init__(self, files: tuple[SourceFile, ...], tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._random = random.Random(recipe.seed)
        self._cut_texts = recipe.cut_texts
        self._files = [self._encode(tokenizer, self._pieces(file.text)) for file in files]
        self._chats: list[list[int]] = []
        self._alone: list[list[int]] = []
        for function in (function for file in files for function in functions(file)):
            if function.summary:
                chat = f"{USER}{function.summary}{EOS}{ASSISTANT}{function.source}"
                self._chats.append(self._encode(tokenizer, [chat]))
            else:
                self._alone.append(self._encode(tokenizer, self._pieces(function.source)))

    def windows(self, length: int, rows: int) -> Iterator[torch.Tensor]:
        """Batches [rows, length + 1]: epochs of shuffled documents laid end to end, cut, and the cuts shuffled."""
        while True:
            stream = torch.tensor([token for document in self._epoch() for token in document])
            starts = list(range(0, len(stream) - length - 1, length))
            self._random.shuffle(starts)
            for first in range(0, len(starts) - rows + 1, rows):
                yield torch.stack([stream[at : at + length + 1] for at in starts[first : first + rows]])

    def _epoch(self) -> list[list[int]]:
        chats = self._random.sample(self._chats, int(CHAT_SHARE * len(self._chats)))
        alone = self._random.sample(self._alone, int(ALONE_SHARE * len(self._alone)))
        documents = self._files + chats + alone
        self._random.shuffle(documents)
        return documents

    def _pieces(self, text: str) -> list[str]:
        """The text, in one piece or cut at random."""
        pieces = [""]
        for line in text.splitlines(keepends=True) if self._cut_texts else [text]:
            if self._cut_texts and self._random.random() < CUTS_PER_LINE_START:
                pieces.append("")
            within = self._random.randrange(len(line)) if self._cut_texts and self._random.random() < CUTS_PER_LINE else 0
            pieces[-1] += line[:within]
            pieces += [""] * (within > 0)
            pieces[-1] += line[within:]
        return pieces

    @staticmethod
    def _encode(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
        """BOS, the tokens of each piece by itself, EOS."""
        encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
        ids = (token for encoding in encodings for token in encoding.ids)
        return [tokenizer.token_to_id(BOS), *ids, tokenizer.token_to_id(EOS)]


class Trainer:
    """One optimiser step at a time, on fp32 masters of a model that computes in bf16.

    bf16 runs the matrix products of this model 1.6 times as fast as fp32 where the CPU has AVX512_BF16, and the file
    holds bf16 in any case. Each thread works through parts of the batch on one core of its own, which is a fifth
    faster than two cores inside every operation, and does not stall when another process takes one of them.
    """

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe, threads: int) -> None:
        self._model = model
        self._recipe = recipe
        self._copies = list(model.parameters())
        self._masters = [copy.detach().float().clone().requires_grad_() for copy in self._copies]
        for copy in self._copies:
            copy.data = copy.data.bfloat16()
        named = list(zip((name for name, _ in model.named_parameters()), self._masters, strict=True))
        matrices = [master for name, master in named if name.endswith("proj.weight")]
        others = [master for name, master in named if not name.endswith("proj.weight")]
        self._optimisers = [self._muon(matrices[first::PARTS]) for first in range(PARTS)]
        self._optimisers.append(torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0))
        self._rates = [optimiser.param_groups[0]["lr"] for optimiser in self._optimisers]
        self._pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))

    def step(self, batch: torch.Tensor, scale: float) -> float:
        """Learn from batch [rows, length + 1] at `scale` times the rates. Returns the loss before it, in nats."""
        losses, gradients = zip(*self._pool.map(self._gradients, batch.chunk(PARTS)), strict=True)
        for master, parts in zip(self._masters, zip(*gradients, strict=True), strict=True):
            master.grad = torch.stack([part.float() for part in parts]).mean(0)
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * scale
        list(self._pool.map(lambda optimiser: optimiser.step(), self._optimisers))
        with torch.no_grad():
            for master, copy in zip(self._masters, self._copies, strict=True):
                copy.copy_(master)
        return sum(losses) / len(losses)

    def _gradients(self, part: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = loss_of(self._model, part)
        return loss.item(), torch.autograd.grad(loss, self._copies)

    def _muon(self, matrices: list[torch.Tensor]) -> torch.optim.Optimizer:
        rate, decay = self._recipe.matrix_rate, self._recipe.matrix_decay
        return torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


def rate_scale(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then fall to zero in a straight line: 0..1 for steps 0..recipe.steps - 1."""
    falling_from = recipe.constant_share * recipe.steps
    warm = (step + 1) / recipe.warmup_steps
    fall = (recipe.steps - step) / (recipe.steps - falling_from)
    return min(warm, 1.0, fall)


def batches(documents: Documents, recipe: Recipe) -> Iterator[torch.Tensor]:
    for phase in recipe.phases:
        windows = documents.windows(phase.length, TOKENS_PER_STEP // phase.length)
        for _ in range(phase.steps):
            yield next(windows)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; batch [rows, length + 1]."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def tuning_bits(model: LlamaForCausalLM, files: tuple[SourceFile, ...], tokenizer: Tokenizer) -> float:
    """Bits per byte of the tuning files in windows of 512 without overlap: a rough figure, for comparing settings."""
    ids = [token for file in files for token in tokenizer.encode(file.text).ids]
    rows = torch.tensor(ids[: (len(ids) - 1) // 512 * 512 + 1]).unfold(0, 513, 512)
    nats = sum(float(loss_of(model, chunk)) * len(chunk) for chunk in rows.split(8)) * 512
    size = sum(len(file.text.encode()) for file in files) * (rows.numel() / len(ids)) * 512 / 513
    return nats / math.log(2) / size


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config())


def train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: Recipe,
    threads: int = 2,
    scratch: Path | None = None,
) -> None:
    """Train the model in place; it is bf16 afterwards. Prints the loss; leaves a copy in `scratch` every 100 steps."""
    trainer = Trainer(model, recipe, threads)
    documents = Documents(corpus.train, tokenizer, recipe)
    smoothed: float | None = None
    for step, batch in enumerate(batches(documents, recipe)):
        loss = trainer.step(batch, rate_scale(step, recipe))
        smoothed = loss if smoothed is None else smoothed + 0.05 * (loss - smoothed)
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}/{recipe.steps}  loss {smoothed:.3f}  cpu {time.process_time():.0f} s", flush=True)
        if scratch is not None and (step + 1) % 100 == 0:
            print(f"tuning files: {tuning_bits(model, corpus.tuning, tokenizer):.4f} bits per byte", flush=True)
            write_model(model, scratch)


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors as transformers writes them."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.save_pretrained(folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=2_048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    # In both places where readers look for it: tokenizer_config.json, and a file of its own.
    wrapped.save_pretrained(folder, save_jinja_files=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_record(corpus: Corpus, cpu_s: float, wall_s: float) -> None:
    """What this run was, and on which library: demo/evaluate.py says when it sees another one."""
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus_sha256": corpus.digest(),
        "corpus": {
            name: {"files": len(files), "bytes": sum(len(file.text.encode()) for file in files)}
            for name, files in (("train", corpus.train), ("tuning", corpus.tuning), ("held_out", corpus.held_out))
        },
        "steps": [recipe.steps for recipe in (WHOLE_TEXTS, CUT_TEXTS)],
        "tokens": sum(recipe.steps for recipe in (WHOLE_TEXTS, CUT_TEXTS)) * TOKENS_PER_STEP,
        "cpu_seconds": round(cpu_s),
        "wall_seconds": round(wall_s),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="score the checkpoint in demo/model instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for a copy of the model every 100 steps")
    arguments = parser.parse_args()
    if arguments.evaluate:
        from demo import evaluate  # it needs this module's names

        evaluate.main()
        return
    started = time.monotonic()
    torch.set_num_threads(1)  # per thread of the trainer's pool
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.train)
    write_tokenizer(tokenizer, MODEL)
    model = new_model(WHOLE_TEXTS.seed)
    for recipe in (WHOLE_TEXTS, CUT_TEXTS):
        train(model, corpus, tokenizer, recipe, arguments.threads, arguments.scratch)
    write_model(model, MODEL)
    write_record(corpus, time.process_time(), time.monotonic() - started)


if __name__ == "__main__":
    main()
