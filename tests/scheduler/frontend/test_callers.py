"""Who may call what, over real gRPC: tokens, tenants, admins; and which files of hashed keys a server starts with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import msgspec
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2, tokenization_pb2
from client import CarouselClient, CarouselError
from scheduler.errors import StartError
from scheduler.frontend.callers import Caller, Callers
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import PATIENCE_S, Frontend, running
from tests.helpers.streams import make
from wire import AddRequest, BlockTable, DrainQuery, EndReason, Explanation, Hindrance, Preemption, RequestStats, RequestSummary

KEYS = {name: f"carousel_{name}-0123456789abcdef" for name in ("alice", "bob", "ops")}
DENIED, UNKNOWN = "PERMISSION_DENIED", "UNAUTHENTICATED"


def line(key: str, **entry: Any) -> str:
    return json.dumps({"sha256": hashlib.sha256(key.encode()).hexdigest()} | entry)


@pytest.fixture(scope="module")
def guarded(shared_core: FakeCore, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontend]:
    """A front end that knows alice, bob, and ops, who is an admin."""
    file = tmp_path_factory.mktemp("keys") / "tokens.jsonl"
    entries = [line(key, tenant=name, admin=name == "ops") for name, key in KEYS.items()]
    file.write_text("# who may call\n\n" + "\n".join(entries) + "\n")
    with running(model_dir, shared_core.endpoint, key_file=str(file)) as frontend:
        frontend.wait_serving()
        yield frontend
        assert "Traceback" not in frontend.log(), frontend.log()
        assert not any(key in frontend.log() for key in KEYS.values())


@pytest.fixture
def held(shared_core: FakeCore, guarded: Frontend) -> Iterator[FakeCore]:
    """The core; requests get no token by themselves."""
    shared_core.forget()
    shared_core.hold()
    yield shared_core
    shared_core.explanations, shared_core.listed, shared_core.tables = {}, [], ()
    shared_core.hold(False)


@pytest.fixture
def connect(guarded: Frontend) -> Iterator[Callable[[str], CarouselClient]]:
    clients: list[CarouselClient] = []

    def client(name: str) -> CarouselClient:
        clients.append(CarouselClient(guarded.target, token=KEYS[name]))
        return clients[-1]

    yield client
    for each in clients:
        each.close()


def explanation(core_id: str, tenant: str, *preemptions: Preemption) -> Explanation:
    numbers = {field.name: 0 for field in msgspec.structs.fields(Explanation) if field.type is int}
    words = {"state": "ended", "hindrance": Hindrance.NONE, "end_reason": EndReason.LENGTH, "stats": RequestStats()}
    return Explanation(**numbers | words, request_id=core_id, tenant=tenant, preemptions=preemptions)


def status_of(call: Callable[[], Any]) -> tuple[str, str]:
    """(status, message) of a call that fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code().name, error.details()


def calls(frontend: Frontend, metadata: Any) -> dict[str, Callable[[], Any]]:
    """One of each kind."""
    how = {"metadata": metadata, "timeout": PATIENCE_S}
    return {
        "Generate": lambda: list(frontend.generation.Generate(make(), **how)),
        "GenerateMany": lambda: list(frontend.generation.GenerateMany(iter(()), **how)),
        "Cancel": lambda: frontend.generation.Cancel(generation_pb2.CancelRequest(request_id="x"), **how),
        "Tokenize": lambda: frontend.tokenization.Tokenize(tokenization_pb2.TokenizeRequest(text="fox"), **how),
        "GetLoad": lambda: frontend.control.GetLoad(control_pb2.GetLoadRequest(), **how),
        "ListRequests": lambda: frontend.control.ListRequests(control_pb2.ListRequestsRequest(), **how),
        "GetBlockTables": lambda: frontend.inspect.GetBlockTables(inspect_pb2.GetBlockTablesRequest(), **how),
        "WatchSteps": lambda: next(iter(frontend.inspect.WatchSteps(inspect_pb2.WatchStepsRequest(), **how))),
    }


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "a token is needed: send it as metadata, authorization: Bearer TOKEN"),
        ([("authorization", "Bearer nobody's")], "the token is not known here"),
        ([("authorization", "Bearer ")], "the token is not known here"),
        ([("authorization", f"Basic {KEYS['ops']}")], "the token is not known here"),
        ([("authorization", hashlib.sha256(KEYS["ops"].encode()).hexdigest())], "the token is not known here"),
        ([("authorization", f"Bearer {KEYS['ops']}"), ("authorization", "Bearer other")], "the token is not known here"),
    ],
)
def test_without_a_known_token_nothing_of_ours_is_called(guarded: Frontend, metadata: Any, said: str) -> None:
    for name, call in calls(guarded, metadata).items():
        assert (name, *status_of(call)) == (name, UNKNOWN, said)


def test_a_call_that_sends_nothing_is_refused_all_the_same(guarded: Frontend) -> None:
    """Whoever has no token can't keep a stream open by saying nothing."""
    commands: SimpleQueue[None] = SimpleQueue()
    call = guarded.generation.GenerateMany(iter(commands.get, None), timeout=PATIENCE_S)
    assert status_of(lambda: next(call))[0] == UNKNOWN
    commands.put(None)


def test_health_and_reflection_are_open(guarded: Frontend) -> None:
    guarded.wait_serving()
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    [answer] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "carousel.v1.Generation" in {service.name for service in answer.list_services_response.service}


def test_control_and_inspect_are_for_admins(guarded: Frontend, held: FakeCore) -> None:
    held.hold(False)
    admin = {"GetLoad": "Control", "ListRequests": "Control", "GetBlockTables": "Inspect", "WatchSteps": "Inspect"}
    for name, call in calls(guarded, [("authorization", f"Bearer {KEYS['alice']}")]).items():
        if name in admin:
            said = f"carousel.v1.{admin[name]} is for admins, and this token is not an admin's"
            assert (name, *status_of(call)) == (name, DENIED, said)
        else:
            call()
    as_admin = calls(guarded, [("authorization", f"bearer {KEYS['ops']}")])
    for name in set(as_admin) - {"WatchSteps"}:
        as_admin[name]()


def test_only_an_admin_watches_the_load_and_ends_the_server(guarded: Frontend, held: FakeCore) -> None:
    how = {"metadata": [("authorization", f"Bearer {KEYS['alice']}")], "timeout": PATIENCE_S}
    assert status_of(lambda: next(guarded.control.WatchLoad(control_pb2.WatchLoadRequest(), **how)))[0] == DENIED
    assert status_of(lambda: guarded.control.Drain(control_pb2.DrainRequest(), **how))[0] == DENIED
    assert not [message for message in held.all_heard() if isinstance(message, DrainQuery)]
    how["metadata"] = [("authorization", f"Bearer {KEYS['ops']}")]
    watched = guarded.control.WatchLoad(control_pb2.WatchLoadRequest(), **how)
    assert next(watched).load.total_blocks
    watched.cancel()
    kept = held.facts
    assert guarded.control.Drain(control_pb2.DrainRequest(), **how).left_ms
    held.tell(kept)
    guarded.wait_serving()


def test_a_request_belongs_to_its_tokens_tenant(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    stream = connect("alice").generate("fox", max_tokens=1)
    assert held.wait_for(AddRequest).header.tenant == "alice"
    held.step()
    assert stream.request_id and [event.summary.request_id for event in stream][-1] == stream.request_id
    named = connect("alice").generate("fox", max_tokens=1, tenant="alice")
    assert held.wait_for(AddRequest).header.tenant == "alice"
    named.close()


def test_another_tenants_name_is_refused(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    said = "scheduling.tenant is 'bob', the token's tenant is 'alice'"
    with pytest.raises(CarouselError, match=said) as raised:
        list(connect("alice").generate("fox", tenant="bob"))
    assert raised.value.code.name == DENIED
    with connect("alice").generate_many() as many:
        request_id = many.submit("fox", tenant="bob")
        many.finish()
        [event] = many
    assert (event.request_id, event.failed.code, event.failed.message) == (request_id, 7, said)


def test_cached_prompts_are_shared_in_a_tenant_only(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    def key(name: str, **options: Any) -> bytes:
        stream = connect(name).generate("fox", **options)
        found = held.wait_for(AddRequest).header.prefix_key
        stream.close()
        return bytes(found)

    assert key("alice") == key("alice") == key("alice", cache_salt="alice")
    assert len({key("alice"), key("bob"), key("bob", cache_salt="alice"), key("bob", cache_salt="alice/alice")}) == 4


def test_ids_of_two_tenants_are_apart(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    """The same id lives twice, and nobody reaches the other's."""
    alice, bob, ops = connect("alice"), connect("bob"), connect("ops")
    streams = []
    for client in (alice, bob):
        streams.append(client.generate("fox", request_id="twin", max_tokens=1))
        held.wait_for(AddRequest)
    with pytest.raises(CarouselError) as raised:
        list(alice.generate("fox", request_id="twin"))
    assert (raised.value.code.name, raised.value.message) == ("ALREADY_EXISTS", "a request with this request_id is alive")
    for client, request_id in ((ops, "twin"), (ops, "alice/twin"), (bob, "alice/twin"), (bob, "../alice/twin")):
        assert client.cancel(request_id) == generation_pb2.CANCEL_OUTCOME_NOT_FOUND
    assert alice.cancel("twin") == generation_pb2.CANCEL_OUTCOME_CANCELLED
    with pytest.raises(CarouselError) as raised:
        list(streams[0])
    assert raised.value.code.name == "CANCELLED"
    held.step()
    assert [event.summary.request_id for event in streams[1]][-1] == "twin"


def test_a_request_of_many_is_cancelled_by_its_own_connection(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    with connect("alice").generate_many() as many:
        many.submit("fox", request_id="mine")
        assert held.wait_for(AddRequest).header.request_id == "alice/mine"
        many.cancel("mine")
        many.finish()
        assert [(event.request_id, event.failed.code) for event in many if event.HasField("failed")] == [("mine", 1)]


def test_an_admin_sees_ids_as_their_tenants_chose_them(held: FakeCore, connect: Callable[[str], CarouselClient]) -> None:
    summary = RequestSummary("alice/a/b", "running", "alice", 2, 1, 5, 6, 1, 3)
    held.listed, held.tables = [summary], (BlockTable("bob/x", 0, 0, 4, (1,)),)
    held.explanations = {"ops/mine": explanation("ops/mine", "ops", Preemption(1, "bob/x", 3, False))}
    ops = connect("ops")
    [listed] = ops.list_requests().requests
    assert (listed.request_id, listed.tenant) == ("a/b", "alice")
    assert ops.block_tables().tables[0].request_id == "x"
    told = ops.explain("mine")
    assert (told.request_id, told.preemptions[0].by_request_id) == ("mine", "x")
    assert ops.explain("mine", "ops").request_id == "mine"
    with ops.watch_steps() as steps:
        stream = connect("alice").generate("fox", request_id="seen", max_tokens=1)
        held.wait_for(AddRequest)
        held.step()
        record = next(iter(steps))
        assert [row.request_id for row in record.rows] == ["seen"] and [leave.request_id for leave in record.leaves] == ["seen"]
    list(stream)


def test_another_tenants_request_is_explained_to_an_admin_who_names_the_tenant(
    held: FakeCore, connect: Callable[[str], CarouselClient]
) -> None:
    held.explanations = {"bob/x/y": explanation("bob/x/y", "bob")}
    ops = connect("ops")
    assert ops.explain("x/y", "bob").request_id == "x/y"
    for request_id, tenant in (("x/y", None), ("bob/x/y", None), ("y", "bob/x"), ("x/y", "alice")):
        with pytest.raises(CarouselError) as raised:
            ops.explain(request_id, tenant)
        assert raised.value.code.name == "NOT_FOUND"


def test_no_key_stands_in_the_command_line_of_a_front_end(guarded: Frontend) -> None:
    words = Path(f"/proc/{guarded.process.pid}/cmdline").read_bytes().decode()
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS.values()]
    assert "tokens.jsonl" in words and not any(secret in words for secret in [*KEYS.values(), *hashes])


# --------------------------------------------------------------------------------------------------------------- the file


def test_a_key_is_found_by_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    file.write_text("\n".join(["  # a comment", "", line("one", tenant="a"), line("two", tenant="a", admin=True)]))
    callers = Callers.load(str(file))
    assert (callers.of("one"), callers.of("two")) == (Caller("a", False), Caller("a", True))
    assert callers.of("") is callers.of("on") is callers.of("One") is callers.of("ключ") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n# nothing\n", " has no entry: make one with"),
        ("carousel_hush", ", line 1: must be a JSON object"),
        ('{"key": "carousel_hush", "tenant": "a"}', ", line 1: must be a JSON object"),
        ('{"sha256": "carousel_hush", "tenant": "a"}', ", line 1: sha256 must be the 64 hexadecimal digits"),
        ('{"sha256": "abcd", "tenant": "a"}', ", line 1: sha256 must be the 64 hexadecimal digits"),
        (line("one", tenant="a", admin="yes"), ", line 1: must be a JSON object"),
        (line("one", tenant="a") + "\n" + line("two", tenant=""), ", line 2: tenant must be 1 to 128 printable characters"),
        (line("one", tenant="a/b"), ", line 1: tenant must be 1 to 128 printable characters, none of them '/'"),
        (line("one", tenant="a") + "\n" + line("one", tenant="b"), ", line 2: the same key stands in a line before"),
    ],
)
def test_a_file_that_can_not_be_used_is_named_and_not_shown(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    file.write_text(text)
    with pytest.raises(StartError) as raised:
        Callers.load(str(file))
    assert str(raised.value).startswith(f"--tokens {file}{said}") and "hush" not in str(raised.value)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path, said in ((tmp_path / "nowhere", "No such file or directory"), (binary, "is not UTF-8 text")):
        with pytest.raises(StartError, match=said):
            Callers.load(str(path))
