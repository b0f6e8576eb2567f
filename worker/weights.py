"""Weights by name, out of a checkpoint's safetensors files. Which names a model has is written in the model's own file.

Files are mapped into memory and copied tensor by tensor into the model's dtype and device, so no second copy of the model
ever exists. safetensors only: a pickle can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.model_config import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BASE = "model."  # checkpoints saved without the language model's head leave it out of their names
_NOT_WEIGHTS = (".rotary_emb.inv_freq", "decoder.version", ".attn.masked_bias")  # of old checkpoints; computed, not read


class CheckpointError(ModelError):
    """A checkpoint that can't be read; the text is one line naming the file and the tensor."""


class Weights(Protocol):
    """Where a model takes its weights from as it is put together."""

    dtype: torch.dtype
    device: torch.device
    quantization: str  # of matrices that are multiplied with: one of layers.products.QUANTIZATIONS
    deterministic: bool  # products whose rows do not depend on one another, bit for bit
    num_parameters: int  # taken so far

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have this shape, in `dtype` on `device`."""

    def table(self, name: str, *shape: int) -> Tensor:
        """As take(), for a tensor of which rows are picked: in the dtype that it is stored in, where that takes less memory."""

    def stack(self, parts: Mapping[str, int], *rest: int) -> Tensor:
        """The tensors of `parts`, [rows, *rest] each, one below the other: one product for several projections."""

    def same(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor that must be `tensor` once more, if it is stored at all (tied weights). Otherwise an error."""


class Checkpoint:
    """The Weights of a directory. A context: the files stay mapped inside it."""

    def __init__(
        self,
        model_dir: Path,
        device: torch.device | str,
        dtype: torch.dtype | str | None,
        quantization: str = "none",
        stored: bool = True,
        deterministic: bool = False,
    ) -> None:
        """dtype None: that of the first stored tensor. Raises CheckpointError, also if a shard is missing."""
        self.device, self.quantization, self.num_parameters = torch.device(device), quantization, 0
        self.deterministic = deterministic
        self._files: dict[Path, Any] = {}  # open safetensors files
        self._file_of = _tensor_files(model_dir) if stored else {}
        self._where = model_dir
        self._left = set(self._file_of)
        if dtype is None:
            dtype = self._stored_dtype(min(self._file_of)) if self._file_of else torch.float32
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def take(self, name: str, *shape: int) -> Tensor:
        return self.stack({name: shape[0]}, *shape[1:])

    def table(self, name: str, *shape: int) -> Tensor:
        stored = self._stored_dtype(self._stored_name(name)) if self._stored_name(name) in self._file_of else self.dtype
        return self._stack({name: shape[0]}, shape[1:], min(self.dtype, stored, key=lambda dtype: dtype.itemsize))

    def stack(self, parts: Mapping[str, int], *rest: int) -> Tensor:
        return self._stack(parts, rest, self.dtype)

    def _stack(self, parts: Mapping[str, int], rest: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensors of `parts` in `dtype`, one below the other, copied out of the files."""
        stored = [self._read(name, (rows, *rest)) for name, rows in parts.items()]  # mapped, not in memory yet
        whole = torch.empty(sum(parts.values()), *rest, dtype=dtype, device=self.device)
        self.num_parameters += whole.numel()
        for place, tensor in zip(whole.split(list(parts.values())), stored, strict=True):
            place.copy_(tensor)
        return whole

    def same(self, name: str, tensor: Tensor) -> None:
        stored = self._stored_name(name)
        if stored not in self._file_of:
            return
        if not torch.equal(self._read(name, tuple(tensor.shape)).to(self.dtype), tensor.cpu().to(self.dtype)):
            what = "config.json ties it to the embedding (tie_word_embeddings), but it differs from it"
            raise CheckpointError(f"{self._file_of[stored]}: tensor {stored}: {what}")

    def check_all_taken(self) -> None:
        """Raises CheckpointError if the files hold a tensor that the model did not take."""
        left = sorted(name for name in self._left if not name.endswith(_NOT_WEIGHTS))
        if left:
            more = f", and {len(left) - 1} more," if len(left) > 1 else ""
            raise CheckpointError(f"{self._file_of[left[0]]}: tensor {left[0]}{more} has no place in this architecture")

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._stored_name(name)
        path = self._file_of.get(stored)
        if path is None:
            raise CheckpointError(f"{self._where}: tensor {name} is missing")
        self._stored_dtype(stored)
        try:
            tensor = self._open(path).get_tensor(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {stored}: {_one_line(error)}") from None
        if tuple(tensor.shape) != shape:
            expected = f"config.json makes it {list(shape)}"
            raise CheckpointError(f"{path}: tensor {stored} has shape {list(tensor.shape)}, {expected}")
        self._left.discard(stored)
        return tensor

    def _stored_name(self, name: str) -> str:
        return name if name in self._file_of else name.removeprefix(_BASE)

    def _stored_dtype(self, stored: str) -> torch.dtype:
        path = self._file_of[stored]
        try:
            dtype = self._open(path).get_slice(stored).get_dtype()
        except SafetensorError:
            raise CheckpointError(f"{path}: tensor {stored} is missing, though {_INDEX} says it is here") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {stored} is stored as {dtype}; {', '.join(DTYPES)} are implemented")
        return DTYPES[dtype]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = _open(path)
        return self._files[path]


class RandomWeights:
    """Made up where they are wanted, without a file: for measurements of a model's shape. Equal seeds give equal weights on one
    kind of device. As models are before training: matrices normal with a deviation of 0.02, norms one, biases zero."""

    _DEVIATION = 0.02

    def __init__(
        self,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        quantization: str = "none",
        deterministic: bool = False,
    ) -> None:
        self.device, self.dtype, self.quantization, self.num_parameters = torch.device(device), dtype, quantization, 0
        self.deterministic = deterministic
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def take(self, name: str, *shape: int) -> Tensor:
        self.num_parameters += math.prod(shape)
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value, dtype=self.dtype, device=self.device)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, self._DEVIATION, generator=self._generator)

    def table(self, name: str, *shape: int) -> Tensor:
        return self.take(name, *shape)

    def stack(self, parts: Mapping[str, int], *rest: int) -> Tensor:
        return self.take(next(iter(parts)), sum(parts.values()), *rest)

    def same(self, name: str, tensor: Tensor) -> None:
        pass


class Outline(Checkpoint):
    """Weights without content: a model that is put together with them takes no memory, and they say what it would take."""

    def __init__(self, model_dir: Path, dtype: torch.dtype | str | None, stored: bool = True) -> None:
        """Not stored: of random weights."""
        super().__init__(model_dir, "meta", dtype, stored=stored)
        self._matrices: list[tuple[int, int]] = []  # outputs, inputs
        self._other_bytes = 0

    def stack(self, parts: Mapping[str, int], *rest: int) -> Tensor:
        if len(rest) != 1:
            return super().stack(parts, *rest)
        self._matrices.append((sum(parts.values()), rest[0]))
        return torch.empty(self._matrices[-1], dtype=self.dtype, device=self.device)

    def same(self, name: str, tensor: Tensor) -> None:
        self._matrices.append((tensor.shape[0], tensor.shape[1]))  # it is multiplied with too

    def _stack(self, parts: Mapping[str, int], rest: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = torch.empty(sum(parts.values()), *rest, dtype=dtype, device=self.device)
        self._other_bytes += whole.nbytes
        return whole

    def footprint(self, quantization: str) -> Footprint:
        """Of the model that was put together, if its matrices were quantized so."""
        whole = [outputs * inputs * self.dtype.itemsize for outputs, inputs in self._matrices]
        if quantization == "none":
            return Footprint(self._other_bytes + sum(whole), max(whole))
        packed = [outputs * (inputs + _INT8_ROW_BYTES) for outputs, inputs in self._matrices]
        return Footprint(self._other_bytes + sum(packed), max(map(sum, zip(whole, packed, strict=True))))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of main memory."""

    resident: int  # packed matrices, and tables and vectors as they are
    passing: int  # beside them at most, while they are loaded: a matrix before it is packed

    @property
    def peak(self) -> int:
        return self.resident + self.passing


_INT8_ROW_BYTES = 8  # scale and zero, of each row of a quantized matrix


def _tensor_files(model_dir: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = model_dir / _INDEX
    if index.exists():
        return _indexed(index)
    single = model_dir / _SINGLE
    if single.exists():
        return dict.fromkeys(_open(single).keys(), single)
    pickles = sorted(path.name for pattern in _PICKLES for path in model_dir.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{model_dir / pickles[0]}: pickled weights are not read, they can run code: convert to safetensors"
        )
    raise CheckpointError(f"{model_dir}: holds neither {_SINGLE} nor {_INDEX}")


def _indexed(index: Path) -> dict[str, Path]:
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: no weight_map that can be read: {_one_line(error)}") from None
    files = {}
    for tensor, name in sorted(names.items()):
        # A name that leads out of the directory is no shard.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {tensor}: {name!r} is no safetensors file of this directory")
        files[tensor] = index.parent / name
        if not files[tensor].exists():
            raise CheckpointError(f"{files[tensor]}: the shard is missing; tensor {tensor} should be in it")
    for path in set(files.values()):
        for tensor in set(_open(path).keys()) - set(files):
            files[tensor] = path  # in no index: check_all_taken will name it
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_damage(path) or _one_line(error)}") from None


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file that can't be opened: 8 bytes of header length, header (JSON), data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or begin > size:
                return f"truncated in its header, at byte {size:,}, before its first tensor (or no safetensors file)"
            entries = json.loads(file.read(begin - 8))
        ends = {name: begin + entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
        cut = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return f"truncated: tensor {cut[0]} ends at byte {ends[cut[0]]:,}, the file at {size:,}" if cut else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
