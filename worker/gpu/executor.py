"""Steps on a GPU. submit() launches a step and returns; a thread of its own fetches what was drawn and answers, in the order of
the plans, while the next step runs. A token goes from the step that drew it to the next one on the device.

A step in which every row decodes is one captured launch (graphs.py); others, and those that tell log-probabilities, are
launched operation by operation, which the device hides as long as it has the step before to do. A step that fails becomes a
StepFailed of one line; when the device itself is lost the process ends, and its supervisor starts another.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wire import PlanHeader, ResultHeader, SamplingSpec, SequenceStart, StepFailed, StepPlan, StepResult
from wire.messages import I32
from worker.attention.base import AttentionInputs
from worker.attention.triton_paged import AttentionPlan, AttentionShape, TritonPagedAttention, gpu_of, rehearse
from worker.executor import Deliver, failure, one_line
from worker.gpu.blocks import DeviceBlocks
from worker.gpu.draw import Lists, draw
from worker.gpu.graphs import Graphs, sizes_up_to
from worker.gpu.inputs import Sizes, StepInputs, cut, put, step_inputs
from worker.gpu.state import DeviceState, has_long_list
from worker.gpu.streams import CudaStreams, Fetched, HostStreams, Streams, is_of_memory, to_device
from worker.kernels.prepare import gather_tables, prepare_tokens, write_tables
from worker.loading import Loaded
from worker.logprobs import OfDraws, Told, of_prompts
from worker.sequences import PlanError, Sequences, StepRows

log = logging.getLogger(__name__)

_LOST = 3  # exit status of a worker whose device is gone


@dataclass(slots=True)
class _Launched:
    """A step under way."""

    plan: StepPlan
    rows: StepRows
    fetched: Fetched
    told: Told


class GpuExecutor:
    """sizes: of the captured steps, instead of graphs.sizes_up_to. exit_process: what ends it when the device is lost."""

    def __init__(
        self,
        loaded: Loaded,
        streams: Streams | None = None,
        sizes: Sequence[int] | None = None,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.facts, self._model, self._kv, self._device = loaded.facts, loaded.model, loaded.kv, loaded.device
        self._streams = streams or (CudaStreams(self._device) if self._device.type == "cuda" else HostStreams())
        self._exit_process = exit_process
        self._sequences = Sequences(self.facts)
        self._table_width = self._sequences.block_tables.shape[1]
        self._state = DeviceState(self.facts.max_batch_rows, self._table_width, self.facts.vocab_size, self._device)
        self._blocks = DeviceBlocks(self._kv)
        self._attention = TritonPagedAttention()
        heads = (loaded.shape.num_heads, loaded.shape.num_kv_heads, loaded.shape.head_dim)
        self._shape = AttentionShape(*heads, self._kv.layers[0].dtype, self._device, gpu_of(self._device))
        self._numbers = torch.zeros(0, dtype=torch.int32, device=self._device)
        sizes = sizes or sizes_up_to(self.facts.max_batch_rows)
        with torch.inference_mode():
            self._graphs = Graphs(sizes, self._decode, self._streams, self._device, self._state.dump, self._table_width)
        self._rehearse()
        self._pending: queue.SimpleQueue[tuple[_Launched | StepFailed, Deliver] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="results", daemon=True)
        self._reader.start()

    def reset(self) -> None:
        self._sequences.reset()

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        self._pending.put((self._launch_or_fail(plan), deliver))

    def close(self) -> None:
        self._pending.put(None)
        self._reader.join()
        self._streams.synchronize()
        del self._graphs, self._model, self._blocks, self._kv

    def _rehearse(self) -> None:
        """A step of every kind, so that what can't work fails before the hello, and no kernel is compiled while somebody
        waits for it: attention of few and of many prompts; a long chunk; one token, with all that can be asked for, beside a
        decode; decodes."""
        with torch.inference_mode():
            rehearse(self._kv.layers[0], self._shape)
        facts, block_size = self.facts, self.facts.block_size
        blocks = np.arange(1, min(facts.num_blocks, self._table_width) + 1, dtype=np.int32)
        long = min(facts.max_step_tokens, facts.max_model_len - 2, len(blocks[:-1]) * block_size - 2)
        if long < 1 or min(facts.max_batch_rows, facts.max_step_tokens) < 2:
            return  # too small for two rows: compiled when it is needed
        everything = SamplingSpec(1.0, 5, 0.9, 0.1, 0, repetition_penalty=1.1, logprobs=1)
        rows = [(0, long, blocks[:-1], _PLAIN), (1, 1, blocks[-1:], everything)]
        starts = [SequenceStart(slot, slot, 0, 1, count, 0, len(own), spec) for slot, count, own, spec in rows]
        first, second, both = np.zeros(1, np.uint16), np.ones(1, np.uint16), np.arange(2, dtype=np.uint16)
        one, two = np.ones(1, np.int32), np.ones(2, np.int32)
        header = PlanHeader(0, 0, 0, (starts[0],))
        plans = [
            StepPlan(header, long * one, start_tokens=np.zeros(long, np.int32), start_blocks=blocks[:-1], slots=first),
            StepPlan(PlanHeader(0, 0, 1, (starts[1],)), two, start_tokens=0 * one, start_blocks=blocks[-1:], slots=both),
            StepPlan(PlanHeader(0, 0, 2, ()), one, slots=first),
            StepPlan(PlanHeader(0, 0, 3, ()), one, slots=second),
        ]
        for plan in plans:
            launched = self._launch(plan)
            launched.fetched.wait()
            launched.told.message(plan)
        if facts.num_blocks > 1:
            self._blocks.copy(blocks[:1], blocks[1:2])
        self._streams.synchronize()
        self.reset()

    # ------------------------------------------------------------------------------------------------------- launching

    def _launch_or_fail(self, plan: StepPlan) -> _Launched | StepFailed:
        try:
            return self._launch(plan)
        except PlanError as error:
            log.error("step %d: %s", plan.header.step_id, error)
            return failure(plan, error)
        except Exception as error:
            log.exception("step %d failed", plan.header.step_id)
            self._give_up_if_lost(error)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return failure(plan, error)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> _Launched:
        rows, told = self._sequences.apply(plan), Told()
        sizes, inputs = step_inputs(self._sequences, rows)
        self._streams.begin()
        self._move_blocks(plan)
        self._state.start(plan, self._sequences)
        size = self._graphs.size_of(len(rows.slots), sizes.writes) if self._is_plain_decode(rows) else None
        tokens_N = self._graphs.run(size, inputs) if size is not None else self._one_by_one(sizes, inputs, rows, told)
        return _Launched(plan, rows, self._streams.fetch(tokens_N[: rows.num_sampled]), told)

    def _is_plain_decode(self, rows: StepRows) -> bool:
        """Whether all rows compute one token and draw, with nothing but what the device keeps."""
        if len(rows.drawing) != len(rows.slots) or (rows.count != 1).any():
            return False
        columns = self._sequences.columns
        tells = (columns.logprobs[rows.slots] >= 0) | (columns.prompt_logprobs[rows.slots] >= 0)
        return not (tells.any() or has_long_list(columns, rows.slots))

    def _move_blocks(self, plan: StepPlan) -> None:
        if len(plan.swap_out_blocks):
            self._blocks.swap_out(plan.swap_out_blocks, plan.swap_out_host_blocks)
        if len(plan.swap_in_blocks):
            self._blocks.swap_in(plan.swap_in_host_blocks, plan.swap_in_blocks)
        if len(plan.copy_to):
            self._blocks.copy(plan.copy_from, plan.copy_to)

    def _one_by_one(self, sizes: Sizes, inputs: StepInputs[I32], rows: StepRows, told: Told) -> Tensor:
        """Launches the operations of any step."""
        x = self._upload(sizes, inputs)
        if not sizes.rows:
            write_tables(x.write_places, x.write_blocks, self._state.block_tables_SW)
            return x.ids
        width = -(-int(inputs.context_lens.max()) // self.facts.block_size)
        hidden_TC = self._forward(x, width, inputs, None)
        of_prompts(told, self._sequences, rows, hidden_TC, self._model.logits)
        if not sizes.draws:
            return x.drawing
        logits_NV = self._model.logits(hidden_TC[x.drawing.long()])
        of_draws = OfDraws(self._sequences, rows, logits_NV)
        tokens_N = draw(logits_NV, self._state, x.draw_slots, x.draw_positions, self._lists(rows))
        of_draws.tell(told, rows, tokens_N)
        return tokens_N

    def _upload(self, sizes: Sizes, inputs: StepInputs[I32]) -> StepInputs[Tensor]:
        if len(self._numbers) < sizes.total:
            self._numbers = torch.zeros(2 * sizes.total, dtype=torch.int32, device=self._device)
        numbers = self._streams.buffer(sizes.total)
        put(inputs, cut(numbers, sizes))
        self._streams.upload(numbers, self._numbers)
        return cut(self._numbers, sizes)

    def _lists(self, rows: StepRows) -> Lists | None:
        """Stop tokens and biases of the rows that draw, where the device does not keep all of them."""
        columns, slots = self._sequences.columns, rows.slots[rows.drawing]
        if not has_long_list(columns, slots):
            return None
        arrays = (columns.bias_token_ids[slots], columns.bias[slots], columns.stop_token_ids[slots])
        return Lists(*(to_device(array, self._device) for array in arrays))

    def _decode(self, x: StepInputs[Tensor]) -> Tensor:
        """A decode step, as it is captured: reads and writes the same memory each time, and no number of the host's."""
        plan = AttentionPlan.of_decode(len(x.ids), self.facts.max_model_len, self._shape)
        hidden_TC = self._forward(x, self._table_width, None, plan)
        return draw(self._model.logits(hidden_TC), self._state, x.draw_slots, x.draw_positions, None)

    def _forward(self, x: StepInputs[Tensor], width: int, host: StepInputs[I32] | None, plan: AttentionPlan | None) -> Tensor:
        state, block_size = self._state, self.facts.block_size
        write_tables(x.write_places, x.write_blocks, state.block_tables_SW)
        ids_T, positions_T, slot_mapping_T = prepare_tokens(
            x.ids, x.positions, x.token_slots, state.last_tokens_S, state.block_tables_SW, block_size
        )
        tables_RW = gather_tables(x.row_slots, state.block_tables_SW, width)
        inputs = AttentionInputs(
            query_start=x.query_start,
            context_lens=x.context_lens,
            block_tables=tables_RW,
            slot_mapping=slot_mapping_T,
            query_start_cpu=host.query_start if host else _NONE,
            context_lens_cpu=host.context_lens if host else _NONE,
            block_tables_cpu=_NONE,
            max_query_len=int(np.diff(host.query_start).max()) if host else 1,
            plan=plan,
        )
        return self._model.forward(ids_T, positions_T, self._attention, self._kv, inputs)

    # -------------------------------------------------------------------------------------------------------- answering

    def _read(self) -> None:
        while (item := self._pending.get()) is not None:
            step, deliver = item
            if isinstance(step, _Launched):
                try:
                    self._answer(step, deliver)
                    continue
                except Exception as error:
                    log.exception("step %d failed", step.plan.header.step_id)
                    self._give_up_if_lost(error)
                    step = failure(step.plan, error)
            deliver(step)

    def _answer(self, step: _Launched, deliver: Deliver) -> None:
        tokens, duration_ns = step.fetched.wait()
        header = step.plan.header
        with torch.inference_mode(), self._streams.beside():
            logprobs = step.told.message(step.plan)
        if logprobs is not None:
            deliver(logprobs)
        slots = step.rows.sampled_slots.astype(np.uint16)
        deliver(StepResult(ResultHeader(header.group, header.epoch, header.step_id, duration_ns), tokens, slots))

    def _give_up_if_lost(self, error: Exception) -> None:
        """After an error of the device itself, unlike one of memory, nothing works in this process any more. Libraries tell of
        it in errors of their own; the device says so at every call."""
        if is_of_memory(error):
            return
        try:
            if isinstance(error, torch.AcceleratorError):
                raise error
            self._streams.synchronize()
        except Exception as lost:
            log.critical("the GPU is lost: %s", one_line(lost))
            self._exit_process(_LOST)


_NONE: I32 = np.empty(0, np.int32)
_PLAIN = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
