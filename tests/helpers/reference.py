"""What transformers generates from a checkpoint, with the gap between its two best choices at each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from wire import SamplingSpec
from worker.sampler import keep_slowly, whole_noise

NEAR_TIE = 1e-4  # float32 sums in another order differ by about 1e-5
TIES_PER_TOKEN = 1e-4


@dataclass(frozen=True, slots=True)
class Reference:
    """Output of one prompt; gaps[i] is the difference between the two best scores of tokens[i]: logits, or perturbed ones."""

    tokens: list[int]
    gaps: list[float]


def greedy(model_dir: Path, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[Reference]:
    """Each prompt alone, in float32, end tokens ignored."""
    model = _load(model_dir)
    return [
        _generate(model, prompt, count, lambda logits, _: logits) for prompt, count in zip(prompts, max_tokens, strict=True)
    ]


def sampled(
    model_dir: Path, prompt: Sequence[int], max_tokens: int, sampling: SamplingSpec, num_outputs: int
) -> list[Reference]:
    """Outputs 0 .. num_outputs - 1 of a request, each drawn from transformers' logits by the slow sampler."""

    def perturb(output_index: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
        def scores(logits: torch.Tensor, position: int) -> torch.Tensor:
            scores = logits / sampling.temperature
            keep_slowly(scores, sampling.top_k, sampling.top_p, sampling.min_p)
            seed = np.uint64(sampling.seed)
            return scores + torch.from_numpy(whole_noise(len(scores), seed, np.int64(position), np.int32(output_index)))

        return scores

    model = _load(model_dir)
    return [_generate(model, prompt, max_tokens, perturb(index)) for index in range(num_outputs)]


def _load(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def _generate(
    model: torch.nn.Module, prompt: Sequence[int], count: int, scores: Callable[[torch.Tensor, int], torch.Tensor]
) -> Reference:
    """scores: of the next token's logits and its position; the best one is taken."""
    out = model(torch.tensor([list(prompt)]), use_cache=True)
    tokens, gaps = [], []
    for position in range(len(prompt), len(prompt) + count):
        best = torch.topk(scores(out.logits[0, -1].float(), position), 2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return Reference(tokens, gaps)


class Comparison:
    """Collects outputs and says at the end whether they are the reference's, near ties aside."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.ties: list[str] = []

    def add(self, name: str, got: Sequence[int], reference: Reference) -> None:
        """Raises AssertionError when the first difference is no near tie."""
        assert len(got) == len(reference.tokens), f"{name}: {len(got)} tokens, transformers gives {len(reference.tokens)}"
        self.num_tokens += len(got)
        for i, (mine, theirs, gap) in enumerate(zip(got, reference.tokens, reference.gaps, strict=True)):
            if mine != theirs:
                assert gap < NEAR_TIE, f"{name}: token {i} is {mine}, transformers gives {theirs} with a gap of {gap:.2g}"
                self.ties.append(f"{name}: token {i}, gap {gap:.2g}")
                return

    def check(self) -> None:
        """Prints the near ties; at most one in 10,000 tokens (at least one is allowed) may have differed."""
        print(f"{self.num_tokens} tokens compared, {len(self.ties)} near ties decided otherwise", *self.ties, sep="\n  ")
        assert len(self.ties) <= max(1, self.num_tokens * TIES_PER_TOKEN)
