"""`carousel policy`, `load`, `requests` and so on against a real gRPC server that says what the test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import client.cli
from carousel.v1 import control_pb2, generation_pb2, inspect_pb2
from tests.helpers.fake_server import WAIT_S, FakeServer

REPO = Path(__file__).parents[2]
MS, SECOND = 1_000_000, 1_000_000_000


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture
def say(server, capfdbinary):
    """Runs the command; its lines."""

    def run(*arguments: str, code: int = 0) -> list[str]:
        assert client.cli.main([*arguments, "--target", server.target]) == code
        out, err = capfdbinary.readouterr()
        assert not (err if code == 0 else out)
        return (out or err).decode().splitlines()

    return run


def test_policy_says_which_one_is_in_force_and_changes_it(server, say):
    assert say("policy") == ["continuous"]
    assert say("policy", "static") == ["static"] and server.policy == "static"
    assert json.loads(say("policy", "--json")[0]) == {"policy": "static"}


def test_an_unknown_policy_is_one_line(say):
    assert say("policy", "fifo", code=1) == ["carousel: policy is not changed: unknown policy 'fifo' (INVALID_ARGUMENT)"]


def test_the_load_is_a_table(say):
    lines = [" ".join(line.split()) for line in say("load")]
    assert "requests 0 running, 0 waiting with 0 tokens" in lines
    assert "blocks 0 held, 0 retiring, 0 cached, 10 free, of 10" in lines
    assert json.loads(say("load", "--json")[0])["free_blocks"] == 10


def test_a_watched_load_is_a_line_a_message(server, say):
    heading, *lines = say("load", "--watch")
    assert heading.split()[:5] == ["RUNNING", "WAITING", "HELD", "CACHED", "FREE"]
    assert [line.split()[4:7] for line in lines] == [["10", "0.0%", str(steps)] for steps in range(3)]
    assert not server.watched.get().HasField("interval_ms"), "the server's default holds"
    assert [json.loads(line)["steps"] for line in say("load", "--watch", "--json", "--interval", "0.25")] == ["0", "1", "2"]
    assert server.watched.get().interval_ms == 250


@pytest.mark.parametrize("arguments", [("--interval", "2"), ("--watch", "--interval", "0"), ("--watch", "--interval", "61")])
def test_an_interval_out_of_range_or_without_watch_is_wrong_usage(arguments, say):
    [line] = say("load", *arguments, code=2)
    assert "--interval" in line


def test_ctrl_c_ends_a_watch(server):
    server.watch_goes_on = True
    command = [sys.executable, "-m", "client", "load", "--watch", "--target", server.target]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() and process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT_S)[1] == b"" and process.returncode == 130


@pytest.mark.parametrize(
    ("alive", "words"), [(0, "no request is alive"), (1, "1 request is alive"), (7, "7 requests are alive")]
)
def test_drain_says_how_many_are_alive_and_by_when_they_are_over(alive, words, server, say):
    server.live_requests = alive
    assert say("drain") == [f"draining: {words}; ends within 4.20 s"]
    assert not server.drained.get().HasField("timeout_ms"), "the server's own time holds"
    assert json.loads(say("drain", "--timeout", "0", "--json")[0]) == {"live_requests": alive, "left_ms": "4200"}
    asked = server.drained.get()
    assert asked.HasField("timeout_ms") and asked.timeout_ms == 0


def test_replace_worker_says_which_one_computes_or_why_none_new_does(say):
    assert say("replace-worker") == ["worker (pid 4711) computes now, epoch 4"]
    assert json.loads(say("replace-worker", "--json")[0]) == {"pid": 4711, "epoch": 4}
    [line] = say("replace-worker", "--device", "cuda", code=1)
    assert "did not start" in line


def summaries(count: int) -> list[control_pb2.RequestSummary]:
    return [
        control_pb2.RequestSummary(
            request_id=f"request-{i}",
            state=control_pb2.REQUEST_STATE_RUNNING if i % 2 else control_pb2.REQUEST_STATE_WAITING,
            tenant="team-a" if i else "",
            priority=generation_pb2.PRIORITY_CLASS_INTERACTIVE,
            arrival_ns=20 * SECOND - i % 4 * 250 * MS,
            prompt_tokens=100 + i,
            output_tokens=i,
            num_outputs=1,
            held_blocks=7,
        )
        for i in range(count)
    ]


def test_requests_are_a_table(server, say):
    server.alive = summaries(2)
    heading, first, second, total = say("requests")
    assert heading.split() == ["REQUEST", "STATE", "CLASS", "TENANT", "AGE", "PROMPT", "OUTPUT", "OUTPUTS", "BLOCKS"]
    assert first.split() == ["request-0", "waiting", "interactive", "-", "0", "ms", "100", "0", "1", "7"]
    assert second.split() == ["request-1", "running", "interactive", "team-a", "250", "ms", "101", "1", "1", "7"]
    assert total == "2 requests"


def test_no_requests_are_no_table(say):
    assert say("requests") == ["0 requests"]


def test_all_pages_are_shown_up_to_the_limit(server, say):
    server.alive = summaries(2500)
    assert say("requests", "--limit", "2400")[-1] == "2400 of 2500 requests"
    lines = [json.loads(line) for line in say("requests", "--limit", "9999", "--json")]
    assert [line["request_id"] for line in lines] == [f"request-{i}" for i in range(2500)]
    assert lines[1]["state"] == "REQUEST_STATE_RUNNING" and lines[1]["held_blocks"] == 7


def test_names_are_shown_in_full_and_harmless(server, say):
    server.alive = summaries(1)
    server.alive[0].request_id, server.alive[0].tenant = "x" * 128, "[bold]\x1b[2J"
    row = say("requests")[1]
    assert "x" * 128 in row and "[bold]\ufffd[2J" in row


def explanation(**changes) -> control_pb2.ExplainRequestResponse:
    told = control_pb2.ExplainRequestResponse(
        request_id="why",
        state=control_pb2.REQUEST_STATE_PREEMPTED,
        tenant="team-a",
        priority=generation_pb2.PRIORITY_CLASS_BATCH,
        now_ns=30 * SECOND,
        arrival_ns=10 * SECOND,
        hindrance=control_pb2.HINDRANCE_BLOCKS,
        rank=2,
        missing_blocks=4,
        needed_blocks=9,
        tenant_tokens=600,
        least_tenant_tokens=500,
        predicted_start_ns=30 * SECOND + 70 * MS,
        computed_tokens=13,
        usage=generation_pb2.Usage(prompt_tokens=40, cached_tokens=32, output_tokens=5, recomputed_tokens=3),
        timing=generation_pb2.Timing(queued_ns=1 * MS, prefill_ns=2 * MS, decode_ns=3 * MS, preempted_ns=4 * MS, preemptions=1),
        preemptions=[control_pb2.Preemption(at_ns=29 * SECOND, by_request_id="other", lost_tokens=13, swapped=True)],
        text="Preempted: it is next.",
    )
    told.MergeFrom(control_pb2.ExplainRequestResponse(**changes))
    return told


def test_an_explanation_is_a_sentence_and_the_numbers(server, say):
    server.explanations["why"] = explanation()
    lines = say("explain", "why")
    assert lines[0] == "Preempted: it is next."
    text = "\n".join(" ".join(line.split()) for line in lines)
    for part in (
        "state preempted",
        "class, tenant batch, team-a",
        "arrived 20.0 s ago",
        "hindered by blocks; 2 before it; missing blocks: 4 of 9",
        "tenant was served 600 weighted tokens; who is next: 500",
        "should start in 70 ms",
        "tokens prompt 40 (32 cached), output 5",
        "tokens in the cache 13, 3 computed again",
        "queued 1 ms",
        "preempted 4 ms, 1 times",
        "1.00 s ago other 13 swapped to host memory",
    ):
        assert part in text, (part, text)


def test_an_explanation_of_what_has_ended_says_how(server, say):
    server.explanations["why"] = explanation(
        state=control_pb2.REQUEST_STATE_ENDED, finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )
    server.explanations["why"].predicted_start_ns = 27 * SECOND
    words = [line.split() for line in say("explain", "why")]
    assert ["state", "ended", "(length)"] in words and ["started", "3.00", "s", "ago"] in words


def test_an_explanation_of_what_has_ended_says_when_and_not_what_hinders_it(server, say):
    server.explanations["why"] = told = explanation(
        state=control_pb2.REQUEST_STATE_ENDED, finish_reason=generation_pb2.FINISH_REASON_LENGTH
    )
    told.hindrance = control_pb2.HINDRANCE_NONE
    told.timing.time_to_first_token_ns = 15 * SECOND
    text = "\n".join(" ".join(line.split()) for line in say("explain", "why"))
    assert "hindered" not in text
    assert "ended 4.99 s ago, 15.0 s after it arrived" in text, "decoded 3 ms, and waited 4 ms after the preemption at 19 s"


def test_a_running_request_is_hindered_by_nothing_and_does_not_say_so(server, say):
    server.explanations["why"] = told = explanation(state=control_pb2.REQUEST_STATE_RUNNING)
    told.hindrance = control_pb2.HINDRANCE_NONE
    assert "hindered" not in "\n".join(say("explain", "why"))


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("ENDED", "DEADLINE", "given up"),
        ("ENDED", "CANCELLED", "given up"),
        ("PREEMPTED", None, "given up"),
        ("ENDED", "LENGTH", "given up, computed again"),
        ("RUNNING", None, "given up, computed again"),
    ],
)
def test_what_was_given_up_is_computed_again_only_if_the_request_went_on(server, say, state, reason, words):
    server.explanations["why"] = told = explanation(
        state=control_pb2.RequestState.Value(f"REQUEST_STATE_{state}"),
        finish_reason=generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}") if reason else None,
    )
    told.preemptions[0].swapped = False
    assert say("explain", "why")[-1].endswith(words)


def test_an_admin_names_the_tenant_whose_request_is_explained(server, say):
    server.explanations["why"] = explanation()
    assert say("explain", "why", "--tenant", "team-a")[0] == say("explain", "why")[0]
    assert server.explained.get().tenant == "team-a" and not server.explained.get().HasField("tenant")


def test_json_of_an_explanation_is_the_message(server, say):
    server.explanations["why"] = explanation()
    [line] = say("explain", "why", "--json")
    told = json.loads(line)
    assert (told["hindrance"], told["missing_blocks"], told["usage"]["cached_tokens"]) == ("HINDRANCE_BLOCKS", 4, 32)
    assert told["preemptions"][0]["by_request_id"] == "other" and "finish_reason" not in told


def test_an_unknown_request_is_one_line(say):
    assert say("explain", "nobody", code=1) == ["carousel: no request 'nobody' is known (NOT_FOUND)"]


def test_blocks_are_counted_and_shown_by_table(server, say):
    held, free = inspect_pb2.BLOCK_STATE_HELD, inspect_pb2.BLOCK_STATE_FREE
    retiring, cached = inspect_pb2.BLOCK_STATE_RETIRING, inspect_pb2.BLOCK_STATE_CACHED
    server.tables = inspect_pb2.GetBlockTablesResponse(
        block_size=16,
        num_blocks=7,
        tables=[
            inspect_pb2.BlockTable(request_id="a", output_index=0, slot=3, computed_tokens=50, blocks=[1, 2, 3, 6]),
            inspect_pb2.BlockTable(request_id="a", output_index=1, slot=4, computed_tokens=20, blocks=[1, 2]),
        ],
        ref_counts=[2, 2, 1, 0, 0, 1, 0],
        states=[held, held, held, retiring, cached, held, free],
        num_host_blocks=8,
        held_host_blocks=2,
    )
    first, host, _, heading, one, two = say("blocks")
    assert first == "7 blocks of 16 tokens: 4 held (2 shared), 1 retiring, 1 cached, 1 free"
    assert host == "8 blocks of host memory: 2 held"
    assert heading.split() == ["REQUEST", "OUTPUT", "SLOT", "TOKENS", "BLOCKS", "SHARED", "IDS"]
    assert one.split() == ["a", "0", "3", "50", "4", "2", "1-3", "6"]
    assert two.split() == ["a", "1", "4", "20", "2", "2", "1-2"]
    assert json.loads(say("blocks", "--json")[0])["ref_counts"] == [2, 2, 1, 0, 0, 1, 0]


def test_nobody_at_the_target_is_one_line(capsys):
    with FakeServer() as gone:
        target = gone.target
    for command in (["policy"], ["requests"], ["explain", "x"], ["blocks"], ["load"], ["load", "--watch"], ["drain"]):
        assert client.cli.main([*command, "--target", target]) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"no server answers at {target}" in line


def test_a_closed_pipe_ends_it_without_a_word(server):
    server.alive = summaries(1000)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "client", "requests", "--limit", "1000", "--target", server.target]
    with subprocess.Popen(command, cwd=REPO, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.communicate(timeout=WAIT_S)[1] == b"" and process.returncode == 141
