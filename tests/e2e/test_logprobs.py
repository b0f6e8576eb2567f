"""Log-probabilities on a live server are transformers' own, of drawn tokens and of prompts, whatever the batch, the chunks and
the cache were."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from carousel.v1 import generation_pb2 as pb
from client.api import CarouselClient
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, running
from tests.helpers.streams import make

VOCABULARY = 320
PROMPT = [5 + (i * 37) % 290 for i in range(150)]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "llama", tokenizer=True, vocab_size=VOCABULARY, max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with running("--model", str(model_dir), "--device", "cpu", "--num-blocks", "200", "--max-step-tokens", "64") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[CarouselClient]:
    with CarouselClient(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def model(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def expected(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """[i]: log-probabilities of what may stand behind token i."""
    return model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)


def request(prompt: list[int], **options: object) -> pb.GenerateRequest:
    return make(prompt, **({"temperature": 0, "ignore_eos": True} | options))


def deltas(client: CarouselClient, asked: pb.GenerateRequest) -> list[pb.Delta]:
    return [event.delta for event in client.stream(asked, timeout_s=60) if event.HasField("delta")]


def check(told: pb.TokenLogprobs, token: int, logprobs_V: torch.Tensor, num_best: int) -> None:
    assert abs(told.logprob - float(logprobs_V[token])) < TOLERANCE
    best = logprobs_V.topk(num_best)
    assert len(told.top) == num_best
    for entry, value in zip(told.top, best.values.tolist(), strict=True):
        assert abs(entry.logprob - value) < TOLERANCE and abs(float(logprobs_V[entry.token_id]) - value) < TOLERANCE


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.5, "top_k": 9, "seed": 3, "repetition_penalty": 1.5}]
)
def test_of_drawn_tokens_in_company(client: CarouselClient, model: torch.nn.Module, sampling: dict[str, float]) -> None:
    prompts = [PROMPT[: 20 * i + 3] for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda i: deltas(client, request(prompts[i], logprobs=i, **sampling)), range(6))
    for i, answer in enumerate(answers):
        tokens = [token for delta in answer for token in delta.token_ids]
        told = [entry for delta in answer for entry in delta.logprobs]
        assert len(told) == len(tokens) == 12 and all(len(delta.logprobs) == len(delta.token_ids) for delta in answer)
        logprobs = expected(model, prompts[i] + tokens)
        for j, (entry, token) in enumerate(zip(told, tokens, strict=True)):
            check(entry, token, logprobs[len(prompts[i]) + j - 1], num_best=i)


@pytest.mark.parametrize("options", [{}, {"echo": True, "num_outputs": 3, "temperature": 1, "logprobs": 1}])
def test_of_the_prompt_also_if_it_is_cached(client: CarouselClient, model: torch.nn.Module, options: dict[str, object]) -> None:
    deltas(client, request(PROMPT, max_tokens=1))  # its blocks are in the cache now
    answer = deltas(client, request(PROMPT, prompt_logprobs=2, **options))
    of_prompt = [delta for delta in answer if delta.is_prompt]
    assert [delta.output_index for delta in of_prompt] == list(range(3 if options else 1))
    logprobs = expected(model, PROMPT)
    for delta in of_prompt:
        assert list(delta.token_ids) == PROMPT and len(delta.logprobs) == len(PROMPT)
        assert delta.logprobs[0] == pb.TokenLogprobs()
        for i in range(1, len(PROMPT)):
            check(delta.logprobs[i], PROMPT[i], logprobs[i - 1], num_best=2)
    rest = [delta for delta in answer if not delta.is_prompt]
    assert all(len(delta.logprobs) == (len(delta.token_ids) if options else 0) for delta in rest)


def test_held_back_tokens_keep_theirs(client: CarouselClient, model: torch.nn.Module) -> None:
    """With stop strings, tokens go out late, and those behind the stop string never do."""
    whole = client.stream(request(PROMPT[:40], max_tokens=40), timeout_s=60)
    text = "".join(event.delta.text for event in whole)
    stop = text[len(text) // 2 :][:4]
    answer = deltas(client, request(PROMPT[:40], max_tokens=40, stop=[stop], logprobs=0))
    tokens = [token for delta in answer for token in delta.token_ids]
    told = [entry for delta in answer for entry in delta.logprobs]
    assert stop not in "".join(delta.text for delta in answer) and 0 < len(tokens) < 40
    logprobs = expected(model, PROMPT[:40] + tokens)
    for j, (entry, token) in enumerate(zip(told, tokens, strict=True)):
        check(entry, token, logprobs[39 + j], num_best=0)


def test_one_token_prompts_have_nothing_to_tell(client: CarouselClient) -> None:
    answer = deltas(client, request([7], prompt_logprobs=3, max_tokens=1))
    assert [(delta.is_prompt, list(delta.logprobs)) for delta in answer] == [(True, [pb.TokenLogprobs()]), (False, [])]
