"""The bundled checkpoint is what demo/README.md says: its files, its tokenizer, and that it has learnt something."""

import json
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from demo.corpus import load_corpus, part_of

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[2] / "demo" / "model"
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
LICENCE_FILES = {"LICENSE", "NOTICE"}

HELD_OUT_FILE = "plistlib.py"  # its first 12,000 characters
HELD_OUT_BITS_PER_BYTE = 1.217


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def library_text(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")


def test_every_file_of_a_hugging_face_checkpoint_is_there():
    assert {path.name for path in MODEL.iterdir()} >= FILES | LICENCE_FILES


def test_the_weights_are_bf16_and_at_most_12_megabytes():
    path = MODEL / "model.safetensors"
    assert path.stat().st_size <= 12_000_000
    with safetensors.safe_open(path, framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_the_configuration_is_a_llama_with_grouped_heads_and_tied_embeddings():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]


def test_the_vocabulary_has_at_most_4096_entries_and_the_ids_agree(tokenizer):
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert tokenizer.get_vocab_size(with_added_tokens=True) == config["vocab_size"] <= 4_096
    for name, text in (("bos_token_id", "<|begin|>"), ("eos_token_id", "<|end|>")):
        assert config[name] == generation[name] == tokenizer.token_to_id(text)


@pytest.mark.parametrize("text", [" \t\r\n\n  x\r\n", "naïve 😀\u00a0\x00\x7f", "", "  def f():\n\treturn  1  \n\n\n"])
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|begin|>")
    assert tokenizer.decode(ids) == text


def test_a_file_of_the_library_comes_back_exactly_through_both_loaders(tokenizer):
    text = library_text("argparse.py")
    auto = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.encode(text).ids
    assert auto(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert auto.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_opens_the_assistants_turn():
    auto = transformers.AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "user", "content": "Return the sum."}]
    text = auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>Return the sum.<|end|><|assistant|>"
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"] == auto.chat_template


def test_no_file_is_both_learnt_from_and_held_out():
    assert part_of(HELD_OUT_FILE) == "held_out"
    assert part_of("tokenize.py") == part_of("lib2to3/pgen2/tokenize.py")
    corpus = load_corpus()
    names = [{file.name for file in part} for part in (corpus.train, corpus.tuning, corpus.held_out)]
    assert all(names) and len(set.union(*names)) == sum(map(len, names))
    assert not any("site-packages" in name or "/test/" in name for name in set.union(*names))


def test_a_held_out_file_costs_no_more_bits_than_recorded(tokenizer):
    from demo.evaluate import file_bits

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == torch.bfloat16
    text = library_text(HELD_OUT_FILE)[:12_000]
    bits = file_bits(model, tokenizer.encode(text).ids, context=1_024)
    # 0.1: this file in other Python versions, and the rounding of other CPUs.
    assert bits / len(text.encode()) < HELD_OUT_BITS_PER_BYTE + 0.1


@pytest.mark.parametrize(
    ("text", "ended", "passes"),
    [
        ("def f(x):\n    return (x,\n", False, True),
        ("def f(x):\n    return (x,\n", True, False),
        ('def f(x):\n    """Half a docstring\n', False, True),
        ("def f(x):\n    return 'x\n", False, False),
        ("    if x:\n        y\n  z\n", False, False),
        ("def f(x):\n    return x\n", True, True),
    ],
)
def test_only_the_cut_excuses_what_python_tokenizer_complains_of(text, ended, passes):
    from demo.evaluate import judge

    assert judge(text, ended).passes == passes
