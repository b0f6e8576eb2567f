"""`python -m bench.quantization`: what int8 costs in accuracy. Logits of a model and of its quantized twin, over text.

The text is the demo corpus's held-out part, files of Python's standard library that the demo model has not seen: windows from
their beginnings, each computed in one piece through the paged cache, as the worker does it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import provenance

if TYPE_CHECKING:
    from torch import Tensor

_DEMO = Path(__file__).parents[1] / "demo" / "model"
_BLOCK = 16  # tokens
_EXACT, _ACTIVATIONS, _INT8 = "none", "activations", "int8"


@dataclass(frozen=True)
class Loss:
    """Of one way to compute against the exact one, over all tokens of the text."""

    perplexity: float
    max_error: float  # of a logit
    mean_error: float  # absolute
    same_best: float  # share of tokens after which both think the same one the likeliest
    divergence: float  # mean over tokens of KL(exact ‖ this), nats


class Runner:
    """A loaded model, and a cache for one sequence."""

    def __init__(self, folder: Path, quantization: str, longest: int) -> None:
        import torch

        from kvcache.storage import KVStorage
        from worker import attention
        from worker.loading import cache_dtype
        from worker.models import load_model

        self.model, shape = load_model(folder, torch.float32, "cpu", longest, quantization)
        self._blocks = -(-longest // _BLOCK)
        sizes = (shape.num_layers, self._blocks, shape.num_kv_heads, _BLOCK, shape.head_dim)
        self._kv = KVStorage(*sizes, cache_dtype(quantization, torch.float32), "cpu")
        self._attention = attention.choose("cpu")

    def round_activations(self) -> None:
        """From now on the exact products see activations of 8 bits."""
        import torch

        from worker.layers.products import ZERO, quantize_rows

        assert isinstance(self.model, torch.nn.Module)
        for module in self.model.modules():
            if hasattr(module, "_product"):
                exact = module._product

                def rounded(x_TI: Tensor, exact: Any = exact) -> Tensor:
                    quantized_TI, scale_T1 = quantize_rows(x_TI)
                    return exact((quantized_TI.float() - ZERO) * scale_T1)

                module._product = rounded

    def logits(self, tokens: list[int]) -> Tensor:
        """[len(tokens), vocabulary]"""
        import torch

        from worker.attention.base import AttentionInputs

        count, blocks = len(tokens), np.arange(1, self._blocks + 1, dtype=np.int32)
        slots = np.arange(_BLOCK, _BLOCK + count, dtype=np.int64)
        inputs = AttentionInputs.of(np.array([0, count], np.int32), np.array([count], np.int32), blocks[None], slots, "cpu")
        hidden = self.model.forward(torch.tensor(tokens), torch.arange(count), self._attention, self._kv, inputs)
        return self.model.logits(hidden)


def windows(folder: Path, length: int, count: int) -> list[list[int]]:
    """The first `length` tokens of each held-out file, of `count` files at most."""
    from tokenizers import Tokenizer

    from demo.corpus import load_corpus

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [file.text[: length * 20] for file in load_corpus().held_out]
    encoded = [tokenizer.encode(text).ids[:length] for text in texts]
    return [tokens for tokens in encoded if len(tokens) > 1][:count]


class Sums:
    """Adds up a Loss, window by window."""

    def __init__(self) -> None:
        self._tokens = self._values = 0
        self._nats = self._max = self._sum = self._same = self._divergence = 0.0

    def add(self, exact_TV: Tensor, got_TV: Tensor, tokens: list[int]) -> None:
        """Logits after each token of a window. The last one's have no token to be scored on."""
        error = (got_TV - exact_TV).abs()
        log_p, log_q = exact_TV.log_softmax(-1), got_TV.log_softmax(-1)
        following = log_q[range(len(tokens) - 1), tokens[1:]]
        self._tokens += len(tokens) - 1
        self._values += error.numel()
        self._nats -= float(following.sum())
        self._max = max(self._max, float(error.max()))
        self._sum += float(error.double().sum())
        self._same += int((exact_TV.argmax(-1) == got_TV.argmax(-1))[:-1].sum())
        self._divergence += float((log_p.exp() * (log_p - log_q)).sum(-1)[:-1].sum())

    def loss(self) -> Loss:
        count = self._tokens
        perplexity = math.exp(self._nats / count)
        return Loss(perplexity, self._max, self._sum / self._values, self._same / count, self._divergence / count)


def measure(folder: Path, texts: list[list[int]]) -> dict[str, Loss]:
    longest = max(map(len, texts))
    runners = {_EXACT: Runner(folder, "none", longest), _ACTIVATIONS: Runner(folder, "none", longest)}
    runners[_ACTIVATIONS].round_activations()
    runners[_INT8] = Runner(folder, "int8", longest)
    sums = {name: Sums() for name in runners}
    for tokens in _told(texts):
        exact_TV = runners[_EXACT].logits(tokens)
        for name, runner in runners.items():
            sums[name].add(exact_TV, exact_TV if name == _EXACT else runner.logits(tokens), tokens)
    return {name: each.loss() for name, each in sums.items()}


def _told(texts: list[list[int]]) -> Iterator[list[int]]:
    yield from track(texts, "windows", console=Console(stderr=True), transient=True)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path), default=_DEMO, metavar="DIR")
@click.option("--window", type=click.IntRange(2), default=1024, show_default=True, help="Tokens computed in one piece.")
@click.option("--count", type=click.IntRange(1), default=16, show_default=True, help="Windows, at most.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(model: Path, window: int, count: int, json_file: Path | None) -> None:
    import torch

    from worker.model_config import ModelError

    began = time.monotonic()
    try:
        texts = windows(model, window, count)
        with torch.inference_mode():
            losses = measure(model, texts)
    except ModelError as error:
        raise click.ClickException(str(error)) from None
    name = model.name if model != _DEMO else "demo"
    scored, exact = sum(map(len, texts)) - len(texts), losses[_EXACT].perplexity
    table = Table("8 bits", "perplexity", "", "logit error", "max", "same best", "KL, nats", title=name)
    table.columns[0].no_wrap = True
    for kind, loss in losses.items():
        change = "" if kind == _EXACT else f"{100 * (loss.perplexity / exact - 1):+.2f}%"
        numbers = (f"{loss.mean_error:.4f}", f"{loss.max_error:.3f}", f"{100 * loss.same_best:.2f}%", f"{loss.divergence:.2g}")
        table.add_row(kind, f"{loss.perplexity:.4f}", change, *numbers)
    console = Console()
    console.print(table)
    console.print(f"{scored:,} tokens in {len(texts)} windows, {time.monotonic() - began:.0f} s")
    if json_file is not None:
        line: dict[str, Any] = {"model": name, "windows": len(texts), "tokens": scored}
        what = f"accuracy of int8 weights and activations, {name} model, held-out files of the standard library"
        results = {kind: asdict(loss) for kind, loss in losses.items()}
        provenance.append(json_file, provenance.provenance(what) | line | {"results": results})


if __name__ == "__main__":
    main()
