"""Control, Inspect, health, reflection; and the life of the process: readiness, a lost core, SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from carousel.v1 import control_pb2, inspect_pb2
from carousel.v1 import generation_pb2 as pb
from tests.helpers import tokenizer_files
from tests.helpers.fake_core import PATIENCE_S, FakeCore, ready_facts, worker_facts
from tests.helpers.frontend import Frontend, running
from wire import AddRequest, BlockTable, FrontendHello, WatchSteps

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["carousel.v1.Control", "carousel.v1.Generation", "carousel.v1.Inspect", "carousel.v1.Tokenization"]
SERVICES += ["inference.GRPCInferenceService"]


def request(request_id: str = "", max_tokens: int = 5) -> pb.GenerateRequest:
    made = pb.GenerateRequest(stopping=pb.StoppingParams(max_tokens=max_tokens))
    made.token_ids.ids.extend([50, 51, 52])
    if request_id:
        made.request_id = request_id
    return made


def health(frontend: Frontend, service: str = "") -> int:
    return frontend.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status


def unavailable(call: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:  # type: ignore[attr-defined]
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value


def detail_names(error: grpc.RpcError) -> set[str]:
    return {packed.TypeName() for packed in rpc_status.from_call(error).details}


# ------------------------------------------------------------------------------------------------------------- control


def test_server_info_tells_the_cores_facts(core: FakeCore, frontend: Frontend) -> None:
    info = frontend.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (info.version, info.served_model_name, info.policy) == ("0.0.test", "tiny", "continuous")
    assert (info.max_step_tokens, info.max_batch_rows) == (512, 64)
    assert (info.max_queue_requests, info.max_queue_tokens) == (100, 10_000)
    assert info.uptime_ns >= 5_000_000_000
    [worker] = info.workers
    assert (worker.group, worker.epoch, worker.device, worker.pid) == (0, 1, "sim", 4321)
    assert worker.description == "invented tokens"


def test_model_info_tells_the_workers_facts(core: FakeCore, frontend: Frontend) -> None:
    info = frontend.control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert (info.served_model_name, info.architecture, info.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert (info.vocab_size, info.max_model_len, info.block_size, info.num_blocks) == (600, 256, 16, 64)
    assert (info.kv_bytes_per_token, info.num_parameters, list(info.eos_token_ids)) == (1024, 1_000_000, [1])


def test_load_is_the_cores(core: FakeCore, frontend: Frontend) -> None:
    load = frontend.control.GetLoad(control_pb2.GetLoadRequest())
    fields = ["running_requests", "waiting_requests", "waiting_tokens", "total_blocks", "free_blocks", "held_blocks"]
    fields += ["retiring_blocks", "cached_blocks", "kv_tokens", "steps", "output_tokens", "accepted_requests"]
    fields += ["finished_requests", "cancelled_requests", "refused_requests", "preemptions", "recomputed_tokens"]
    fields += ["cached_tokens", "prompt_tokens", "held_host_blocks", "swapped_blocks"]
    assert [getattr(load, name) for name in fields] == list(range(1, 22))
    assert load.kv_waste == (6 * 16 - 9) / (6 * 16)


def test_nothing_held_wastes_nothing(core: FakeCore, frontend: Frontend) -> None:
    core.load = msgspec.structs.replace(core.load, held_blocks=0, kv_tokens=0)
    assert frontend.control.GetLoad(control_pb2.GetLoadRequest()).kv_waste == 0.0


# ------------------------------------------------------------------------------------------------------------- inspect


def watch(frontend: Frontend) -> Iterator[inspect_pb2.WatchStepsResponse]:
    """A watch that is on."""
    call = frontend.inspect.WatchSteps(inspect_pb2.WatchStepsRequest())
    call.initial_metadata()
    return call


def test_watchers_see_every_step_from_then_on(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    numbers = ["cached_blocks", "free_blocks", "token_budget", "num_copies", "swapped_out_blocks", "swapped_in_blocks"]
    core.record = {name: 40 + i for i, name in enumerate(numbers)} | {"policy": "static"}
    core.row = {"tenant": "team-a", "num_cached_tokens": 32}
    watchers = [watch(frontend) for _ in range(2)]
    assert core.wait_for(WatchSteps).on
    stream = frontend.generation.Generate(request("seen", max_tokens=3))
    core.wait_for(AddRequest)
    first = core.num_steps + 1
    core.step(3)
    for watcher in watchers:
        steps = [next(watcher) for _ in range(3)]
        assert [step.step_id for step in steps] == [first, first + 1, first + 2]
        assert [step.skipped_steps for step in steps] == [0, 0, 0]
        assert [[(row.request_id, row.joined) for row in step.rows] for step in steps] == [
            [("seen", True)],
            [("seen", False)],
            [("seen", False)],
        ]
        assert [(leave.request_id, leave.reason) for leave in steps[2].leaves] == [("seen", "length")]
        step = steps[0]
        assert (step.planned_ns, step.duration_ns, step.waiting_requests) == (first * 10, 5, 2)
        assert (step.held_blocks, step.total_blocks, step.kv_tokens) == (3, 64, 40)
        assert (step.cached_blocks, step.free_blocks, step.token_budget) == (40, 41, 42)
        assert (step.copied_blocks, step.swapped_out_blocks, step.swapped_in_blocks, step.policy) == (43, 44, 45, "static")
        row = step.rows[0]
        assert (row.slot, row.num_tokens, row.sampled) == (0, 1, True)
        assert (row.output_index, row.tenant, row.cached_tokens) == (0, "team-a", 32)
    assert len(list(stream)) > 0
    watchers[0].cancel()  # type: ignore[attr-defined]
    stream = frontend.generation.Generate(request("seen again"))
    core.wait_for(AddRequest)
    core.step(5)
    assert next(watchers[1]).rows[0].request_id == "seen again"
    watchers[1].cancel()  # type: ignore[attr-defined]
    assert not core.wait_for(WatchSteps).on, "switched off when the last one left"


def test_rows_say_which_output_they_are(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    watcher = watch(frontend)
    core.wait_for(WatchSteps, lambda message: message.on)
    several = request("several")
    several.sampling.num_outputs = 3
    stream = frontend.generation.Generate(several)
    core.wait_for(AddRequest)
    core.step(5)
    assert [(row.request_id, row.output_index) for row in next(watcher).rows] == [("several", i) for i in range(3)]
    watcher.cancel()  # type: ignore[attr-defined]
    core.wait_for(WatchSteps, lambda message: not message.on)
    assert len(list(stream)) > 3


def test_block_tables_tell_who_holds_what(core: FakeCore, frontend: Frontend) -> None:
    core.tables = (BlockTable("a", 0, 3, 20, (1, 2)), BlockTable("a", 1, 4, 18, (1, 3)))
    core.ref_counts = [2, 1, 1, 0, 0, *[0] * 59]
    core.states = [1, 1, 1, 2, 3, *[0] * 59]
    answer = frontend.inspect.GetBlockTables(inspect_pb2.GetBlockTablesRequest())
    assert (answer.group, answer.block_size, answer.num_blocks) == (0, 16, 64)
    assert (answer.num_host_blocks, answer.held_host_blocks) == (8, 3)
    told = [(table.request_id, table.output_index, table.slot, table.computed_tokens) for table in answer.tables]
    assert told == [("a", 0, 3, 20), ("a", 1, 4, 18)]
    assert [list(table.blocks) for table in answer.tables] == [[1, 2], [1, 3]]
    assert list(answer.ref_counts) == core.ref_counts
    names = [inspect_pb2.BlockState.Name(state).removeprefix("BLOCK_STATE_") for state in answer.states]
    assert names[:6] == ["HELD", "HELD", "HELD", "RETIRING", "CACHED", "FREE"] and len(names) == 64


def test_a_slow_watcher_is_told_how_many_steps_it_missed(core: FakeCore, frontend: Frontend) -> None:
    num_steps = 20_000
    core.hold()
    watcher = watch(frontend)
    core.wait_for(WatchSteps, lambda message: message.on)  # else the first steps, or all, are told to nobody
    first = core.num_steps + 1
    core.call(lambda: [core._step() for _ in range(num_steps)])  # more than transport and queue hold
    frontend.hear_core()
    expected = first
    while expected < first + num_steps:
        step = next(watcher)
        assert step.step_id == expected + step.skipped_steps
        expected = step.step_id + 1
    watcher.cancel()  # type: ignore[attr-defined]
    assert not core.wait_for(WatchSteps, lambda message: not message.on).on


# ------------------------------------------------------------------------------------------------ health, reflection


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_says_serving_for_each_service(service: str, core: FakeCore, frontend: Frontend) -> None:
    assert health(frontend, service) == SERVING


def test_health_follows_the_facts(core: FakeCore, frontend: Frontend) -> None:
    waiting = ready_facts(ready=False, reason="waiting for a worker with its model", workers=())
    for facts, wanted in (
        (waiting, NOT_SERVING),
        (ready_facts(), SERVING),
        (ready_facts(ready=False, draining=True, reason="the server is draining"), NOT_SERVING),
        (ready_facts(), SERVING),
    ):
        core.tell(facts)
        for service in ("", *SERVICES):
            frontend.wait_health(wanted, service)
        assert health(frontend, "liveness") == SERVING, "no reason to start it again"


def test_without_a_worker_requests_are_refused_with_the_reason(core: FakeCore, frontend: Frontend) -> None:
    core.tell(ready_facts(ready=False, reason="waiting for a worker with its model", workers=()))
    frontend.wait_health(NOT_SERVING)
    error = unavailable(frontend.generation.Generate(request()))
    assert error.details() == "waiting for a worker with its model"
    assert detail_names(error) == {"google.rpc.RetryInfo", "google.rpc.ErrorInfo"}
    with pytest.raises(grpc.RpcError) as caught:
        frontend.control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not frontend.control.GetServerInfo(control_pb2.GetServerInfoRequest()).workers


def test_while_draining_requests_are_refused(core: FakeCore, frontend: Frontend) -> None:
    core.tell(ready_facts(ready=False, draining=True, reason="the server is draining"))
    frontend.wait_health(NOT_SERVING)
    error = unavailable(frontend.generation.Generate(request()))
    assert error.details() == "the server is draining" and "google.rpc.RetryInfo" in detail_names(error)


def test_reflection_lists_the_services(core: FakeCore, frontend: Frontend) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(frontend.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = stub.ServerReflectionInfo(iter([ask]))
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="carousel.v1.Generation")
    [answer] = stub.ServerReflectionInfo(iter([ask]))
    assert answer.file_descriptor_response.file_descriptor_proto


# ---------------------------------------------------------------------------------------------------------------- life


def test_before_there_is_a_core_it_is_not_serving(model_dir: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/core"
    with running(model_dir, endpoint) as frontend:
        assert health(frontend) == NOT_SERVING
        assert detail_names(unavailable(frontend.generation.Generate(request()))) >= {"google.rpc.RetryInfo"}
        with pytest.raises(grpc.RpcError) as caught:
            frontend.control.GetLoad(control_pb2.GetLoadRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with FakeCore(endpoint=endpoint) as core:
            assert core.wait_for(FrontendHello).pid == frontend.process.pid
            frontend.wait_serving()
            assert len(list(frontend.generation.Generate(request()))) >= 3


def test_a_lost_core_ends_everything_and_the_next_one_is_found(model_dir: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/core"
    with FakeCore(endpoint=endpoint) as core, running(model_dir, endpoint) as frontend:
        frontend.wait_serving()
        core.hold()
        core.answers_queries = False
        stream, watcher = frontend.generation.Generate(request()), watch(frontend)
        core.wait_for(AddRequest)
        core.step(2)
        load = frontend.control.GetLoad.future(control_pb2.GetLoadRequest())
        core.stop()
        unavailable(stream)
        unavailable(watcher)
        assert load.exception(PATIENCE_S).code() is grpc.StatusCode.UNAVAILABLE
        frontend.wait_health(NOT_SERVING)
        with FakeCore(endpoint=endpoint) as second:
            frontend.wait_serving()
            assert len(list(frontend.generation.Generate(request("anew")))) >= 3
            assert second.wait_for(AddRequest).header.request_id == "anew", "nothing of before is said again"


def test_malformed_messages_of_the_core_are_dropped(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    stream = frontend.generation.Generate(request())
    core.wait_for(AddRequest)
    core.send(b"")
    core.send(b"\x01\xff\xff", b"more")
    core.send(b"\x63rubbish")
    core.hold(False)
    assert len(list(stream)) >= 3
    assert frontend.log().count("dropped a message from the core") >= 3


def test_sigterm_lets_streams_end_and_exits_0(model_dir: Path) -> None:
    with FakeCore() as core, running(model_dir, core.endpoint, drain_timeout_s=PATIENCE_S) as frontend:
        frontend.wait_serving()
        core.hold()
        stream = frontend.generation.Generate(request())
        core.wait_for(AddRequest)
        core.step()
        next(stream)
        health_watch = frontend.health.Watch(health_pb2.HealthCheckRequest())
        assert next(health_watch).status == SERVING
        frontend.process.send_signal(signal.SIGTERM)
        assert next(health_watch).status == NOT_SERVING
        core.hold(False)
        assert list(stream)[-1].WhichOneof("event") == "summary"
        assert frontend.process.wait(PATIENCE_S) == 0


def test_sigterm_ends_streams_after_the_grace(model_dir: Path) -> None:
    with FakeCore() as core, running(model_dir, core.endpoint, drain_timeout_s=0.1) as frontend:
        frontend.wait_serving()
        core.hold()
        stream = frontend.generation.Generate(request())
        core.wait_for(AddRequest)
        assert frontend.terminate() == 0
        with pytest.raises(grpc.RpcError):
            list(stream)


def test_a_model_without_tokenizer_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    frontend = Frontend(tmp_path, f"ipc://{tmp_path}/core")
    try:
        assert frontend.process.wait(PATIENCE_S) == 1
        [line] = frontend.log().splitlines()
        assert line.startswith("frontend: ") and "tokenizer.json" in line
    finally:
        frontend.close()


def test_front_ends_share_a_port(model_dir: Path) -> None:
    """Each connection lands on one of them; both work for the same core."""
    with FakeCore() as core, running(model_dir, core.endpoint) as first:
        first.wait_serving()
        second = Frontend(model_dir, core.endpoint, port=int(first.target.rpartition(":")[2]))
        try:
            pids = {core.wait_for(FrontendHello).pid for _ in range(2)}
            assert pids == {first.process.pid, second.process.pid}
            for i in range(10):
                with grpc.insecure_channel(first.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                    stub = type(first.generation)(channel)
                    assert len(list(stub.Generate(request(f"shared-{i}"), wait_for_ready=True))) >= 3
        finally:
            second.close()


def test_the_models_own_sampling_is_used(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": [1, 2]}
    directory = tokenizer_files.save(tokenizer_files.byte_level(), tmp_path, generation_config=generation)
    with FakeCore(ready_facts(worker_facts(vocab_size=400))) as core, running(directory, core.endpoint) as frontend:
        frontend.wait_serving()
        list(frontend.generation.Generate(request()))
        spec = core.wait_for(AddRequest).header.sampling
        assert (spec.temperature, spec.top_k, spec.top_p, spec.stop_token_ids) == (0.5, 7, 1.0, (1, 2))
