"""What transformers generates from a checkpoint, with the gap between its two best choices at each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4  # float32 sums in another order differ by about 1e-5
TIES_PER_TOKEN = 1e-4


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy output of one prompt; gaps[i] is the difference between the two best logits of tokens[i]."""

    tokens: list[int]
    gaps: list[float]


def greedy(model_dir: Path, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[Reference]:
    """Each prompt alone, in float32, end tokens ignored."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    references = []
    with torch.inference_mode():
        for prompt, count in zip(prompts, max_tokens, strict=True):
            out = model(torch.tensor([list(prompt)]), use_cache=True)
            tokens, gaps = [], []
            for _ in range(count):
                best = torch.topk(out.logits[0, -1].float(), 2)
                tokens.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
                out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            references.append(Reference(tokens, gaps))
    return references


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
