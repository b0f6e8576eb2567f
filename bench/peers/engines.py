"""The engines that can be compared: whose environment, which driver and dtype, how a checkpoint becomes theirs. A table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.peers.environments import LLAMA_CPP_PYTHON, Environment

Class = Literal["float", "int8"]


@dataclass(frozen=True)
class Engine:
    name: str
    peer: str | None  # its environment; None: ours
    driver: str  # of drivers/; of ours "": bench.cpu_carousel runs it
    dtype: str  # as people call it
    compared: Class  # with Carousel in float32, or in int8
    options: Mapping[str, Any] = field(default_factory=dict)  # its driver's
    weights: str = ""  # format that the checkpoint is converted to
    convert: tuple[
        str, ...
    ] = ()  # {bin}, {python}, {drivers}, {checkpoint}, {weights}, {out} are filled in; (): reads it as it is
    model_suffix: str = ""  # of {out}
    note: str = ""  # what a reader of its numbers must know

    def converter(self, checkpoint: Path, out: Path, environment: Environment, drivers: Path) -> list[str]:
        places = {
            "bin": environment.bin,
            "python": environment.python,
            "drivers": drivers,
            "checkpoint": checkpoint,
            "out": out,
        }
        return [part.format(weights=self.weights, **places) for part in self.convert]


_EXPORT = ("{bin}/optimum-cli", "export", "openvino", "-m", "{checkpoint}", "--task", "text-generation-with-past")
_TO_OPENVINO = (*_EXPORT, "--weight-format", "{weights}", "{out}")
_TO_GGUF = ("{python}", "{drivers}/llama_gguf.py", "{checkpoint}", "{weights}", "{out}")


def _openvino(name: str, weights: str, dtype: str, hint: str | None, note: str, **more: str) -> Engine:
    options = ({"INFERENCE_PRECISION_HINT": hint} if hint else {}) | more
    compared: Class = "int8" if weights == "int8" else "float"
    return Engine(
        f"openvino-{name}", "openvino", "openvino_steps.py", dtype, compared, options, weights, _TO_OPENVINO, note=note
    )


def _llamacpp(weights: str, compared: Class) -> Engine:
    name, driver = f"llamacpp-{weights}", "llama_server.py"
    return Engine(name, "llamacpp", driver, weights, compared, weights=weights, convert=_TO_GGUF, model_suffix=".gguf")


_OWN = "the processor's default for what is not int8"
_BY_NAME = (
    Engine("carousel", None, "", "float32", "float"),
    Engine("carousel-int8", None, "", "int8", "int8", {"serve": ("--quantization", "int8")}),
    # A processor with bfloat16 instructions makes OpenVINO compute in it unless it is told otherwise.
    _openvino("fp32", "fp32", "float32", "f32", "KV cache in 8 bits"),
    _openvino("fp32-kv32", "fp32", "float32", "f32", "", KV_CACHE_PRECISION="f32"),
    _openvino("bf16", "fp32", "bfloat16", "bf16", "KV cache in 8 bits"),
    _openvino("int8", "int8", "int8", None, f"KV cache in 8 bits; {_OWN}"),
    _openvino("int8-f32", "int8", "int8", "f32", "KV cache in 8 bits"),
    Engine("vllm", "vllm", "vllm_steps.py", "float32", "float", note="compiled before, cached on disk"),
    Engine("vllm-bf16", "vllm", "vllm_steps.py", "bfloat16", "float", note="compiled before, cached on disk"),
    _llamacpp("f32", "float"),
    _llamacpp("f16", "float"),
    _llamacpp("q8_0", "int8"),
)
ENGINES = {engine.name: engine for engine in _BY_NAME}
DEFAULT = ("carousel", "carousel-int8", "openvino-fp32", "openvino-int8", "vllm", "llamacpp-f16", "llamacpp-q8_0")


def surroundings(engine: Engine, environment: Environment, cores: tuple[int, ...], kv_gib: int) -> dict[str, str]:
    """The environment variables that a peer's driver is started with, besides the usual ones."""
    path = f"{environment.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    more = {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))}
    return more | (_of_vllm(environment, cores, kv_gib) if engine.peer == "vllm" else {})


def _of_vllm(environment: Environment, cores: tuple[int, ...], kv_gib: int) -> dict[str, str]:
    """Its default leaves one core idle; both libraries are what its documentation asks for."""
    found = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CACHE_ROOT": str(environment.folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    preload = [str(path) for path in (tcmalloc(environment.folder), *(environment.folder.glob("venv/lib/libiomp5.so"))) if path]
    return found | ({"LD_PRELOAD": ":".join(preload)} if preload else {})


def tcmalloc(folder: Path, system: tuple[str, ...] = ("/usr/lib", "/usr/lib64", "/usr/local/lib")) -> Path | None:
    """The machine's own, or the one unpacked in the environment's folder."""
    for root in (*map(Path, system), folder / "tcmalloc" / "usr" / "lib"):
        for pattern in ("libtcmalloc_minimal.so.*", "*/libtcmalloc_minimal.so.*"):
            if found := sorted(root.glob(pattern)):
                return found[0]
    return None


def driver_options(engine: Engine, environment: Environment) -> dict[str, Any]:
    """What its driver is told besides the job that all engines share."""
    if engine.peer == "llamacpp":
        server = environment.folder / "build" / "bin" / "llama-server"
        return {"server": str(server), "version": LLAMA_CPP_PYTHON}
    return {}
