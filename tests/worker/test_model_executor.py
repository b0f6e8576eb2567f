"""The executor with a model: hand-made plans, over the wire's bytes, give the tokens that transformers generates."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcache.sizing import SizingError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.plans import GREEDY, PlanMaker
from tests.helpers.reference import Comparison, Reference, greedy
from wire import SamplingSpec, StepFailed, StepPlan, StepResult, decode, encode
from worker import loading, model_executor
from worker.config import ConfigError, WorkerConfig
from worker.model_config import ModelError
from worker.model_executor import ModelExecutor

NUM_TOKENS = 20
VOCAB = 384


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    choose = np.random.default_rng(1)
    return [choose.integers(3, VOCAB, size).tolist() for size in (1, 5, 16, 33, 70)]


@pytest.fixture(scope="module")
def references(checkpoint: Path, prompts: list[list[int]]) -> list[Reference]:
    return greedy(checkpoint, prompts, [NUM_TOKENS] * len(prompts))


def config(**options: object) -> WorkerConfig:
    defaults = {"connect": "ipc://x", "model": "m", "device": "cpu", "threads": 1, "block_size": 16, "num_blocks": 60}
    return WorkerConfig(**(defaults | {"max_batch_rows": 8, "max_step_tokens": 256, "max_model_len": 128} | options))


@pytest.fixture(scope="module")
def executor(checkpoint: Path) -> ModelExecutor:
    return ModelExecutor.of(config(), checkpoint)


@pytest.fixture
def maker(executor: ModelExecutor) -> PlanMaker:
    executor.reset()
    return PlanMaker(executor.facts, shuffle=3)


def submit(executor: ModelExecutor, plan: StepPlan) -> StepResult | StepFailed:
    answers: list[StepResult | StepFailed] = []
    decoded = decode(encode(plan))
    assert isinstance(decoded, StepPlan)
    executor.submit(decoded, answers.append)
    (answer,) = answers
    again = decode(encode(answer))
    assert isinstance(again, StepResult | StepFailed)
    return again


def step(executor: ModelExecutor, plan: StepPlan, got: dict[int, list[int]]) -> None:
    """Computes a plan and notes its tokens by slot."""
    answer = submit(executor, plan)
    assert isinstance(answer, StepResult), answer
    for slot, token in zip(answer.slots.tolist(), answer.tokens.tolist(), strict=True):
        got.setdefault(slot, []).append(token)


def compare(got: dict[int, list[int]], references: Sequence[Reference]) -> None:
    comparison = Comparison()
    for slot, reference in enumerate(references):
        comparison.add(f"slot {slot}", got[slot][:NUM_TOKENS], reference)
    comparison.check()


def test_one_sequence_alone_gives_transformers_tokens(executor, maker, prompts, references) -> None:
    got: dict[int, list[int]] = {}
    maker.start(0, prompts[2])
    for _ in range(NUM_TOKENS):
        step(executor, maker.plan(), got)
    compare(got, references[2:3])


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prompt_in_chunks_gives_the_same_tokens(executor, maker, prompts, references, chunk: int) -> None:
    got: dict[int, list[int]] = {}
    maker.start(0, prompts[4])
    while len(got.get(0, [])) < NUM_TOKENS:
        one = maker.sequences[0]
        step(executor, maker.plan({0: min(chunk, one.known - one.computed)}), got)
    compare(got, references[4:5])


def test_rows_that_come_and_go_with_chunks_among_decodes_give_the_same_tokens(executor, maker, prompts, references) -> None:
    got: dict[int, list[int]] = {}
    for number in range(200):
        if number % 4 == 0 and number // 4 < len(prompts):
            maker.start(number // 4, prompts[number // 4])
        for slot in [slot for slot in maker.sequences if len(got.get(slot, [])) == NUM_TOKENS]:
            maker.end(slot)
        counts = {slot: min(5, one.known - one.computed) for slot, one in maker.sequences.items()}
        step(executor, maker.plan(counts), got)
        if not maker.sequences:
            break
    compare(got, references)


def test_padding_rows_disturb_nobody_and_report_nothing(executor, maker, prompts, references) -> None:
    """A static batch: rows that have ended stay as padding until the last has ended, past the end of their blocks too."""
    got: dict[int, list[int]] = {}
    lengths = [3, 16, 8, 20, 12]
    for slot, prompt in enumerate(prompts):
        maker.start(slot, prompt)
    while any(len(got.get(slot, [])) < lengths[slot] for slot in maker.sequences):
        padding = [slot for slot in maker.sequences if len(got.get(slot, [])) == lengths[slot]]
        step(executor, maker.plan(None, padding), got)
    comparison = Comparison()
    for slot, reference in enumerate(references):
        short = Reference(reference.tokens[: lengths[slot]], reference.gaps[: lengths[slot]])
        comparison.add(f"slot {slot}", got[slot], short)
    comparison.check()


def test_a_sequence_that_was_preempted_goes_on_where_it_was(executor, maker, prompts, references) -> None:
    got: dict[int, list[int]] = {}
    maker.start(0, prompts[3])
    for _ in range(8):
        step(executor, maker.plan(), got)
    maker.end(0)
    maker.start(5, prompts[3] + got[0], num_prompt_tokens=len(prompts[3]))
    while len(got[0]) + len(got.get(5, [])) < NUM_TOKENS:
        step(executor, maker.plan(), got)
    compare({0: got[0] + got[5]}, references[3:4])


def test_seeded_draws_are_the_same_alone_and_in_a_batch(executor, prompts) -> None:
    specs = [SamplingSpec(0.9, 20, 0.95, 0.02, seed) for seed in range(len(prompts))]
    alone: list[list[int]] = []
    for prompt, spec in zip(prompts, specs, strict=True):
        executor.reset()
        single, got = PlanMaker(executor.facts), {}
        single.start(0, prompt, spec)
        for _ in range(12):
            step(executor, single.plan(), got)
        alone.append(got[0])
    executor.reset()
    together, got = PlanMaker(executor.facts), {}
    for slot, (prompt, spec) in enumerate(zip(prompts, specs, strict=True)):
        together.start(slot, prompt, spec)
    for _ in range(12):
        step(executor, together.plan(), got)
    assert [got[slot] for slot in range(len(prompts))] == alone


def test_min_tokens_keeps_the_stop_token_away(executor, maker, prompts, references) -> None:
    stop = references[1].tokens[0]
    got: dict[int, list[int]] = {}
    maker.start(0, prompts[1], SamplingSpec(0.0, 0, 1.0, 0.0, 0, min_tokens=1, stop_token_ids=(stop,)))
    step(executor, maker.plan(), got)
    assert got[0][0] != stop


def test_a_step_that_computes_nothing_gives_an_empty_result(executor, maker, prompts) -> None:
    step(executor, maker.plan(), {})
    maker.start(0, prompts[2])
    got: dict[int, list[int]] = {}
    step(executor, maker.plan({0: 4}), got)
    maker.end(0)
    step(executor, maker.plan(), got)
    assert got == {}


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("out of luck\n  at this place"), "RuntimeError: out of luck at this place"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemoryError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failed_step_is_one_line_and_the_executor_goes_on_after_a_reset(
    executor, maker, prompts, references, monkeypatch, caplog, error: Exception, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    maker.start(0, prompts[1])
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(type(executor._model), "logits", fail)
        failed = submit(executor, maker.plan())
    assert isinstance(failed, StepFailed) and failed.message.startswith(message) and "\n" not in failed.message
    assert (failed.group, failed.epoch, failed.step_id) == (0, 1, 0)
    executor.reset()
    fresh, got = PlanMaker(executor.facts), {}
    fresh.start(0, prompts[1])
    for _ in range(NUM_TOKENS):
        step(executor, fresh.plan(), got)
    compare(got, references[1:2])


def test_a_plan_that_does_not_fit_is_a_failed_step(executor, maker) -> None:
    maker.start(0, [1, 2, 3])
    failed = submit(executor, maker.plan({0: 3}))
    assert isinstance(failed, StepResult)
    wrong = PlanMaker(executor.facts)
    wrong.start(1, [1, 2, 3])
    failed = submit(executor, wrong.plan())
    assert isinstance(failed, StepFailed) and failed.message == "PlanError: step 0 came where step 1 was expected"


def test_facts_say_what_was_loaded(executor) -> None:
    facts = executor.facts
    assert (facts.device, facts.dtype, facts.architecture) == ("cpu", "float32", "LlamaForCausalLM")
    assert (facts.num_blocks, facts.block_size, facts.max_model_len, facts.vocab_size) == (60, 16, 128, VOCAB)
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4 and facts.num_parameters > 100_000
    assert "60 blocks of 16 = 960 tokens" in facts.description and "\n" not in facts.description


def test_the_length_is_the_models_unless_the_pool_holds_less(checkpoint: Path) -> None:
    assert ModelExecutor.of(config(max_model_len=None), checkpoint).facts.max_model_len == 512
    lowered = ModelExecutor.of(config(max_model_len=None, num_blocks=10), checkpoint).facts
    assert lowered.max_model_len == 160 and "512 lowered" in lowered.description


def test_host_memory_to_swap_to_is_none_on_a_cpu_unless_asked_for(executor, checkpoint: Path) -> None:
    assert (executor.facts.num_host_blocks, executor.facts.swap_block_ns) == (0, 0)
    facts = ModelExecutor.of(config(swap_gib=0.001), checkpoint).facts
    assert facts.num_host_blocks == int(0.001 * 2**30) // (16 * facts.kv_bytes_per_token) and facts.swap_block_ns > 0
    assert ", 1 MiB of host memory to swap to" in facts.description
    with pytest.raises(SizingError, match=r"swap space is to have .* are available: lower --swap-gib"):
        ModelExecutor.of(config(swap_gib=1e6), checkpoint)


def test_bfloat16_computes_and_takes_half_the_memory(checkpoint: Path, prompts) -> None:
    executor = ModelExecutor.of(config(dtype="bfloat16"), checkpoint)
    assert executor.facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    maker, got = PlanMaker(executor.facts), {}
    maker.start(0, prompts[2], GREEDY)
    for _ in range(3):
        step(executor, maker.plan(), got)
    assert len(got[0]) == 3 and all(0 <= token < VOCAB for token in got[0])


def test_what_can_not_be_started_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SizingError, match="one sequence of 128 tokens needs 8 blocks"):
        ModelExecutor.of(config(num_blocks=7), checkpoint)
    with pytest.raises(SizingError, match="are available"):
        ModelExecutor.of(config(num_blocks=None, kv_memory_gib=1e6), checkpoint)
    with pytest.raises(ModelError, match="beyond what the model can"):
        ModelExecutor.of(config(max_model_len=513), checkpoint)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelExecutor.of(config(), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            ModelExecutor.of(config(device="cuda"), checkpoint)


# ------------------------------------------------------------------------------------------------------------------- int8


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def quantized(checkpoint: Path, request: pytest.FixtureRequest) -> ModelExecutor:
    return ModelExecutor.of(config(quantization="int8", dtype=request.param), checkpoint)


TWO_STEPS = 2**-4  # of logits between 4 and 8 in bfloat16


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Between the best two logits of each step's first row."""
    seen: list[float] = []

    def sample(logits_NV: torch.Tensor, *more: Any) -> Any:
        best, next_best = logits_NV[0].topk(2).values.tolist()
        seen.append(best - next_best)
        return draw(logits_NV, *more)

    draw = model_executor.sample
    monkeypatch.setattr(model_executor, "sample", sample)
    return seen


def sure(executor: ModelExecutor, prompt: list[int], gaps: list[float]) -> list[int]:
    """The tokens that must be the same however prompts are cut: all. In bfloat16 attention rounds differently by that: all
    before the first place where the best two logits are so near to each other that either may be drawn."""
    gaps.clear()
    tokens = alone(executor, prompt)
    if executor.facts.dtype != "bfloat16":
        return tokens
    return tokens[: next((at for at, gap in enumerate(gaps) if gap <= TWO_STEPS), len(tokens))]


def alone(executor: ModelExecutor, prompt: list[int], chunk: int = 256) -> list[int]:
    """NUM_TOKENS tokens of a sequence that has the executor for itself, its prompt in chunks."""
    executor.reset()
    maker, got = PlanMaker(executor.facts, shuffle=3), {}
    maker.start(0, prompt)
    while len(got.get(0, [])) < NUM_TOKENS:
        one = maker.sequences[0]
        step(executor, maker.plan({0: min(chunk, one.known - one.computed)}), got)
    return got[0]


def test_int8_gives_the_same_tokens_alone_and_among_others(quantized: ModelExecutor, prompts, gaps: list[float]) -> None:
    """Rows come and go, with chunks among decodes; a scale that rows shared would change with each of them."""
    expected = [sure(quantized, prompt, gaps) for prompt in prompts]
    quantized.reset()
    maker, got = PlanMaker(quantized.facts, shuffle=5), {}
    number = 0
    while number < len(prompts) or maker.sequences:
        if number < len(prompts):
            maker.start(number, prompts[number])
            number += 1
        step(quantized, maker.plan({slot: min(5, one.known - one.computed) for slot, one in maker.sequences.items()}), got)
        for slot in [slot for slot in maker.sequences if len(got.get(slot, [])) == NUM_TOKENS]:
            maker.end(slot)
    assert [got[slot][: len(each)] for slot, each in enumerate(expected)] == expected
    assert sum(map(len, expected)) >= len(prompts) * NUM_TOKENS // 3


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_int8_gives_the_same_tokens_for_a_prompt_in_chunks(
    quantized: ModelExecutor, prompts, chunk: int, gaps: list[float]
) -> None:
    for prompt in prompts:
        expected = sure(quantized, prompt, gaps)
        assert alone(quantized, prompt, chunk)[: len(expected)] == expected


def test_int8_is_near_the_model(checkpoint: Path, prompts, references) -> None:
    """Tokens are those of float32 until two logits are nearer to each other than what int8 changes in them."""
    executor = ModelExecutor.of(config(quantization="int8"), checkpoint)
    for prompt, reference in zip(prompts, references, strict=True):
        for mine, theirs, gap in zip(alone(executor, prompt), reference.tokens, reference.gaps, strict=True):
            if mine != theirs:
                assert gap < 0.2
                break


def test_int8_says_so(checkpoint: Path) -> None:
    facts = ModelExecutor.of(config(quantization="int8"), checkpoint).facts
    assert "parameters in float32 with int8 weights on cpu" in facts.description and facts.dtype == "float32"


def test_int8_is_refused_where_a_gpu_was_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--quantization int8 is for a CPU, and --device auto found a GPU: add --device cpu"):
        ModelExecutor.of(config(quantization="int8", device="auto"), checkpoint)


# ------------------------------------------------------------------------------------------------- what the machine has not


@pytest.mark.parametrize(
    ("there_is", "options", "said"),
    [
        (900_000, {}, r"need 841\.. KiB in float32, and 985\.. KiB while they are loaded; 878\.. KiB are available: "),
        (900_000, {}, r": --quantization int8 would need \S+ KiB, --dtype bfloat16 would need \S+ KiB$"),
        (520_000, {}, r"available: --dtype bfloat16 would need \S+ KiB$"),
        (400_000, {"dtype": "bfloat16"}, r"in bfloat16, and .* available: --quantization int8 would need \S+ KiB$"),
        (400_000, {"quantization": "int8"}, r"in float32 with int8 weights, .* available: --dtype bfloat16 would need"),
        (100_000, {}, r"available: free some, or take a smaller model$"),
        (1_050_000, {}, r"KV cache of 60 blocks .*: lower --num-blocks .* \(of 1 MiB that are available, the weights take 84"),
        (1_050_000, {"num_blocks": None, "max_model_len": 512}, r": lower --max-model-len to 160 or .*, the weights take 84"),
    ],
)
def test_too_little_memory_is_said_before_anything_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, there_is: int, options: dict[str, object], said: str
) -> None:
    """The model takes about 1,010,000 bytes while it is loaded, 529,000 in int8 and 505,000 in bfloat16."""
    monkeypatch.setattr(loading, "available_memory", lambda: there_is)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(SizingError, match=said):
        ModelExecutor.of(config(**options), checkpoint)


@pytest.mark.parametrize(
    ("capability", "vnni", "said"),
    [
        ("AVX512", True, "cpu (1 threads"),
        ("AVX512", False, "cpu (1 threads, without VNNI"),
        ("AVX2", False, "cpu (1 threads, without AVX512 and VNNI"),
    ],
)
def test_a_processor_that_lacks_instructions_says_so_and_serves(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, prompts, capability: str, vnni: bool, said: str
) -> None:
    monkeypatch.setattr(loading.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    executor = ModelExecutor.of(config(quantization="int8"), checkpoint)
    assert said in executor.facts.description and ("without" in said) == ("without" in executor.facts.description)
    assert len(alone(executor, prompts[0])) == NUM_TOKENS


def test_more_threads_than_processors_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_cpu_quota", lambda: 1)
    with pytest.raises(ConfigError, match="--threads 2: this process may use 1 processor: 1 at most"):
        ModelExecutor.of(config(threads=2), checkpoint)
