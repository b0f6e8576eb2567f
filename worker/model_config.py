"""What config.json says of a model, checked once and frozen. JSON only: no torch, no transformers (importing it takes seconds).

Both spellings are read: transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and 5 (`dtype`, `rope_parameters`).
Entries that are absent have the value that transformers gives them. An entry that changes what is computed, and that is not
implemented here, is refused by name; entries that don't (dropout, initializer_range, …) are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from kvcache.sizing import bytes_per_token


class ModelError(Exception):
    """A model that can't be served; the text is one line that says what is wrong, and where."""


class ModelConfigError(ModelError):
    """config.json asks for what is not implemented, or makes no sense."""


# -------------------------------------------------------------------------------------------- rotary position embeddings
# One class per rope_type; a field is an entry of rope_parameters. worker.layers.rotary has the formulas.


@dataclass(frozen=True, slots=True)
class DefaultRope:
    rope_theta: float


@dataclass(frozen=True, slots=True)
class LinearRope:
    rope_theta: float
    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    rope_theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    rope_theta: float
    original_max_position_embeddings: int
    factor: float | None = None  # None: max_position_embeddings ÷ original_max_position_embeddings
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRope:
    rope_theta: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]  # [head_dim / 2], for max_model_len up to original_max_position_embeddings
    long_factor: tuple[float, ...]  # [head_dim / 2], beyond it
    factor: float | None = None  # as YarnRope's
    attention_factor: float | None = None  # None: from factor


Rope: TypeAlias = DefaultRope | LinearRope | Llama3Rope | YarnRope | LongRope

ROPES: dict[str, type[Rope]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
    "longrope": LongRope,
}
_HARMLESS_ROPE_ENTRIES = {"rope_type", "type", "partial_rotary_factor", "finetuned"}  # partial_rotary_factor is checked apart

# ------------------------------------------------------------------------------------------------------------- the config


@dataclass(frozen=True, slots=True)
class OptSettings:
    """What only OPT has."""

    word_embed_proj_dim: int  # width of the embeddings; projected where it differs from hidden_size (opt-350m)
    do_layer_norm_before: bool  # False: after (opt-350m)
    has_final_layer_norm: bool
    layer_norm_elementwise_affine: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str  # as config.json names it, e.g. LlamaForCausalLM
    dtype: str | None  # float32, bfloat16 or float16 as config.json says; None: it doesn't
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # divides num_heads
    head_dim: int
    activation: str  # silu, relu or gelu
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    max_model_len: int  # tokens of prompt and output together: what was asked for, else what the model can
    rope: Rope | None  # None: learned positions
    opt: OptSettings | None = None

    @classmethod
    def read(cls, model_dir: Path, max_model_len: int | None = None) -> ModelConfig:
        """From model_dir/config.json. Raises ModelConfigError."""
        path = model_dir / "config.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelConfigError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise ModelConfigError(f"{path}: no JSON: {error}") from None
        if not isinstance(entries, dict):
            raise ModelConfigError(f"{path}: not a JSON object")
        return cls.of(entries, max_model_len, where=str(path))

    @classmethod
    def of(cls, entries: dict[str, Any], max_model_len: int | None = None, where: str = "config.json") -> ModelConfig:
        """From the entries of a config.json; `where` is how errors call it."""
        return _parse(_Entries(where, entries), max_model_len)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return bytes_per_token(self.num_layers, self.num_kv_heads, self.head_dim, bytes_per_value)


class _Entries:
    """Entries of one JSON object; `where` is how errors call it."""

    def __init__(self, where: str, entries: dict[str, Any]) -> None:
        self.where, self.entries = where, entries

    def get(self, name: str, kind: type, default: Any = MISSING) -> Any:
        """The entry, checked for its type (an int is a float too); null counts as absent."""
        value = self.entries.get(name)
        if value is None:
            if default is MISSING:
                raise self.error(f"{name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name} is {value!r}, not of type {kind.__name__}")
        return value

    def count(self, name: str, default: Any = MISSING) -> int:
        """A whole number of at least 1."""
        value = self.get(name, int, default)
        self.check(value >= 1, f"{name} is {value}")
        return value

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise self.error(what)

    def error(self, what: str) -> ModelConfigError:
        return ModelConfigError(" ".join(f"{self.where}: {what}".split()))


def _parse(entries: _Entries, max_model_len: int | None) -> ModelConfig:
    architecture = _architecture(entries)
    for name in ("quantization_config", "compression_config"):
        entries.check(not entries.entries.get(name), f"{name}: quantized checkpoints are not implemented")
    values = _ARCHITECTURES[architecture](entries)
    rope = _rope(entries, values["head_dim"], values["max_position_embeddings"]) if values.get("opt") is None else None
    longest = _longest(values["max_position_embeddings"], rope)
    if max_model_len is not None and not 1 <= max_model_len <= longest:
        raise entries.error(f"max_model_len {max_model_len:,} is beyond what the model can, {longest:,} tokens")
    config = ModelConfig(
        architecture=architecture,
        dtype=_dtype(entries),
        vocab_size=entries.count("vocab_size"),
        hidden_size=entries.count("hidden_size"),
        num_layers=entries.count("num_hidden_layers"),
        max_model_len=values["max_position_embeddings"] if max_model_len is None else max_model_len,
        rope=rope,
        **values,
    )
    grouped = config.num_heads % config.num_kv_heads == 0
    entries.check(
        grouped, f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}"
    )
    return config


def _architecture(entries: _Entries) -> str:
    named = entries.get("architectures", list, [])
    architecture = named[0] if named else _BY_MODEL_TYPE.get(entries.get("model_type", str, ""))
    if architecture not in _ARCHITECTURES:
        what = repr(architecture) if named else f"model_type {entries.entries.get('model_type')!r}"
        raise entries.error(f"the architecture {what} is not implemented; these are: {', '.join(_ARCHITECTURES)}")
    return architecture


def _dtype(entries: _Entries) -> str | None:
    name = entries.get("dtype", str, None) or entries.get("torch_dtype", str, None)
    if name is not None:
        name = name.removeprefix("torch.")
        entries.check(name in ("float32", "bfloat16", "float16"), f"dtype {name!r} is not one of float32, bfloat16, float16")
    return name


def _llama(entries: _Entries) -> dict[str, Any]:
    hidden, heads = entries.count("hidden_size"), entries.count("num_attention_heads")
    activation = _activation(entries, "hidden_act", "silu", ("silu",))
    if entries.get("head_dim", int, None) is None:
        entries.check(hidden % heads == 0, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return dict(
        intermediate_size=entries.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=entries.count("num_key_value_heads", heads),
        head_dim=entries.count("head_dim", hidden // heads),
        activation=activation,
        norm_eps=entries.get("rms_norm_eps", float, 1e-6),
        attention_bias=entries.get("attention_bias", bool, False),
        mlp_bias=entries.get("mlp_bias", bool, False),
        tie_word_embeddings=entries.get("tie_word_embeddings", bool, False),
        max_position_embeddings=entries.count("max_position_embeddings", 2048),
    )


def _qwen3(entries: _Entries) -> dict[str, Any]:
    values = _llama(entries) | dict(mlp_bias=False)  # Qwen3's MLP has none, whatever config.json says
    values["head_dim"] = entries.count("head_dim", 128)
    if "num_key_value_heads" not in entries.entries:
        values["num_kv_heads"] = 32
    values["max_position_embeddings"] = entries.count("max_position_embeddings", 32_768)
    layers = entries.count("num_hidden_layers")
    sliding = entries.get("use_sliding_window", bool, False) and entries.get("sliding_window", int, 4096)
    kinds = entries.get("layer_types", list, None)
    if kinds is None:
        kinds = ["sliding_attention"] * max(0, layers - entries.get("max_window_layers", int, 28)) if sliding else []
    for kind in set(kinds) - {"full_attention"}:
        raise entries.error(f"layer_types has {kind!r} (use_sliding_window): only full attention is implemented")
    return values


def _opt(entries: _Entries) -> dict[str, Any]:
    hidden, heads = entries.count("hidden_size"), entries.count("num_attention_heads")
    entries.check(hidden % heads == 0, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    norm_before = entries.get("do_layer_norm_before", bool, True)
    bias = entries.get("enable_bias", bool, True)
    return dict(
        intermediate_size=entries.count("ffn_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        activation=_activation(entries, "activation_function", "relu", ("relu", "gelu")),
        norm_eps=1e-5,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=entries.get("tie_word_embeddings", bool, True),
        max_position_embeddings=entries.count("max_position_embeddings", 2048),
        opt=OptSettings(
            word_embed_proj_dim=entries.count("word_embed_proj_dim", hidden),
            do_layer_norm_before=norm_before,
            has_final_layer_norm=norm_before and not entries.get("_remove_final_layer_norm", bool, False),
            layer_norm_elementwise_affine=entries.get("layer_norm_elementwise_affine", bool, True),
        ),
    )


_ARCHITECTURES: dict[str, Callable[[_Entries], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
    "OPTForCausalLM": _opt,
}
_BY_MODEL_TYPE = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "opt": "OPTForCausalLM"}


def _activation(entries: _Entries, name: str, default: str, known: tuple[str, ...]) -> str:
    activation = entries.get(name, str, default)
    entries.check(activation in known, f"{name} {activation!r} is not implemented; {', '.join(known)} is")
    return activation


def _rope(config: _Entries, head_dim: int, max_position_embeddings: int) -> Rope:
    """rope_scaling where transformers 4 wrote it, else rope_parameters; what stands beside them fills what they leave out."""
    name = "rope_scaling" if config.entries.get("rope_scaling") else "rope_parameters"
    entries = _Entries(f"{config.where}: {name}", dict(config.get(name, dict, {})))
    kind = entries.get("rope_type", str, None) or entries.get("type", str, "default")
    known = f"the rope_types that are: {', '.join(ROPES)}"
    entries.check(kind != "dynamic", f"rope_type 'dynamic' changes angles with the current length: not implemented; {known}")
    entries.check(kind in ROPES, f"rope_type {kind!r} is not implemented; {known}")
    for part in (config, entries):
        share = part.get("partial_rotary_factor", float, 1.0)
        part.check(share == 1.0, f"partial_rotary_factor {share} is not implemented, only 1")
    cls = ROPES[kind]
    entries.entries.setdefault("rope_theta", config.get("rope_theta", float, 10_000.0))
    if cls in (Llama3Rope, YarnRope, LongRope):
        length = config.get("original_max_position_embeddings", int, None)
        length = entries.get("original_max_position_embeddings", int, max_position_embeddings) if length is None else length
        entries.entries["original_max_position_embeddings"] = length
    _refuse_unknown(entries, kind)
    rope = _of_fields(cls, entries)
    _check_rope(rope, entries, head_dim)
    return rope


def _refuse_unknown(entries: _Entries, kind: str) -> None:
    known = {field.name for field in fields(ROPES[kind])} | _HARMLESS_ROPE_ENTRIES
    for name, value in entries.entries.items():
        entries.check(value is None or name in known, f"{name} is not implemented for rope_type {kind!r}")


_FIELD_TYPES = {
    "original_max_position_embeddings": int,
    "truncate": bool,
    "short_factor": list,
    "long_factor": list,
}  # the others are float


def _of_fields(cls: type[Rope], entries: _Entries) -> Rope:
    values = {field.name: entries.get(field.name, _FIELD_TYPES.get(field.name, float), field.default) for field in fields(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _check_rope(rope: Rope, entries: _Entries, head_dim: int) -> None:
    entries.check(head_dim % 2 == 0, f"rotary embeddings need an even head_dim, not {head_dim}")
    entries.check(rope.rope_theta > 0, f"rope_theta is {rope.rope_theta}")
    factor = getattr(rope, "factor", None)
    entries.check(factor is None or factor >= 1, f"factor is {factor}, less than 1")
    if isinstance(rope, Llama3Rope):
        entries.check(rope.high_freq_factor > rope.low_freq_factor, "high_freq_factor must be above low_freq_factor")
    if isinstance(rope, LongRope):
        for name in ("short_factor", "long_factor"):
            factors = getattr(rope, name)
            numbers = all(isinstance(value, int | float) and value > 0 for value in factors)
            entries.check(numbers and len(factors) == head_dim // 2, f"{name} must be {head_dim // 2} positive numbers")


def _longest(max_position_embeddings: int, rope: Rope | None) -> int:
    """Tokens that the model can take. With yarn, config.json may still give the length before the stretching."""
    if isinstance(rope, YarnRope) and rope.factor is not None:
        return max(max_position_embeddings, int(rope.factor * rope.original_max_position_embeddings))
    return max_position_embeddings
