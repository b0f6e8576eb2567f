"""How the client and its commands reach a server that knows its callers; what they say of files and tokens that are no use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import client.cli
from client import CarouselClient, CarouselError
from tests.helpers.certificates import Authority
from tests.helpers.driven import DrivenClient
from tests.helpers.fake_server import WAIT_S, FakeServer, delta, refuse, words

REPO = Path(__file__).parents[2]
TOKEN = "carousel_0123456789"


class Guarded(FakeServer):
    """Keeps what calls brought as authorization."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        super().__init__(self._script)

    def _script(self, request, context):
        self._hear(context)
        yield from words("a", "b")(request, context)

    def endless(self, request, context):
        self._hear(context)
        while context.is_active():
            yield delta("x")

    def GetBlockTables(self, request, context):
        self._hear(context)
        return super().GetBlockTables(request, context)

    def GenerateMany(self, request_iterator, context):
        self._hear(context)
        yield from ()

    def WatchSteps(self, request, context):
        self._hear(context)
        yield from ()

    def WatchLoad(self, request, context):
        self._hear(context)
        yield from ()

    def Resume(self, request, context):
        self._hear(context)
        context.abort(grpc.StatusCode.NOT_FOUND, "no such request is kept")

    def Cancel(self, request, context):
        self._hear(context)
        return super().Cancel(request, context)

    def add_port(self, credentials: grpc.ServerCredentials) -> int:
        return self._server.add_secure_port("127.0.0.1:0", credentials)

    def _hear(self, context: grpc.ServicerContext) -> None:
        self.heard.append(dict(context.invocation_metadata()).get("authorization"))


@pytest.fixture
def server() -> Iterator[Guarded]:
    with Guarded() as running:
        yield running


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "client", *arguments]
    return subprocess.run(words, cwd=REPO, env=os.environ | environment, capture_output=True, text=True, timeout=WAIT_S)


BOTH = pytest.mark.parametrize("connect", [CarouselClient, DrivenClient], ids=["blocking", "asyncio"])


@BOTH
def test_the_token_goes_with_calls_of_every_kind(server: Guarded, connect: Any) -> None:
    with connect(server.target, token=TOKEN) as client:
        list(client.generate("p"))
        client.block_tables()
        with client.generate_many() as many:
            many.finish()
            assert list(many) == []
        list(client.watch_steps())
        list(client.watch_load())
        with pytest.raises(CarouselError):
            list(client.resume("r"))
        server.script = server.endless
        with client.generate("p") as stream:
            next(stream)
        client.wait_ready()
    assert server.heard == [f"Bearer {TOKEN}"] * 8


@BOTH
def test_calls_are_encrypted_and_large_messages_pass(tmp_path: Path, connect: Any) -> None:
    authority = Authority(tmp_path, "ours")
    own = authority.vouch_for("127.0.0.1")
    pair = [(own.key.read_bytes(), own.certificate.read_bytes())]
    ours = authority.file.read_bytes()
    credentials = grpc.ssl_server_credentials(pair, root_certificates=ours, require_client_auth=True)
    files = {"tls_ca": authority.file, "tls_cert": own.certificate, "tls_key": own.key}
    server = Guarded()
    target = f"127.0.0.1:{server.add_port(credentials)}"
    with server, connect(target, token=TOKEN, **files) as client:
        assert client.generate("p" * (10 << 20)).result().text == "ab"
    assert server.heard == [f"Bearer {TOKEN}"]


@BOTH
def test_without_a_token_none_is_sent(server: Guarded, connect: Any) -> None:
    with connect(server.target) as client:
        list(client.generate("p"))
    assert server.heard == [None]


def test_what_fails_with_a_token_fails_as_without(server: Guarded) -> None:
    server.script = refuse(grpc.StatusCode.PERMISSION_DENIED, "not yours")
    with CarouselClient(server.target, token=TOKEN) as client:
        with pytest.raises(CarouselError, match="not yours"):
            list(client.generate("p"))
        with pytest.raises(CarouselError) as raised:
            client.explain("unknown")
    assert raised.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("token", ["", "two words", "line\nend", "ключ"])
def test_what_is_no_token_is_not_sent_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError) as raised:
        CarouselClient(token=token)
    assert str(raised.value) == "a token is printable ASCII characters, without spaces"


def test_files_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    own, other = authority.vouch_for("own"), authority.vouch_for("other")
    text = tmp_path / "text"
    text.write_text("hush")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CarouselClient(tls_ca=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="go together"):
        CarouselClient(tls_ca=authority.file, tls_cert=own.certificate)
    with pytest.raises(ValueError, match=f"{text} must hold certificates"):
        CarouselClient(tls_ca=text)
    with pytest.raises(ValueError, match="must be a certificate and its private key"):
        CarouselClient(tls_ca=authority.file, tls_cert=own.certificate, tls_key=other.key)


# ---------------------------------------------------------------------------------------------------------- the commands


def test_commands_take_the_token_from_the_option_or_the_environment(server: Guarded) -> None:
    for arguments in (("generate", "--prompt", "p"), ("blocks",)):
        assert command(*arguments, "--target", server.target, CAROUSEL_TOKEN=TOKEN).returncode == 0
        assert command(*arguments, "--target", server.target, "--token", "another", CAROUSEL_TOKEN=TOKEN).returncode == 0
        assert command(*arguments, "--target", server.target, CAROUSEL_TOKEN="").returncode == 0
    assert server.heard == [f"Bearer {TOKEN}", "Bearer another", None] * 2


@pytest.mark.parametrize(
    "arguments", [("generate", "--prompt", "p"), ("policy",), ("requests",), ("explain", "r"), ("blocks",)]
)
def test_commands_say_what_is_wrong_with_files_and_tokens(
    arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    def say(*options: str) -> tuple[int, str]:
        code = client.cli.main([*arguments, *options])
        out, err = capfd.readouterr()
        assert not out
        return code, err

    see = f"see `carousel {arguments[0]} --help`"
    assert say("--tls-ca", "nowhere.pem") == (1, "carousel: nowhere.pem: No such file or directory\n")
    go = "tls_cert and tls_key go together: a certificate and its private key"
    assert say("--tls-cert", "cert.pem") == (2, f"carousel: {go}; {see}\n")
    assert say("--token", "no token") == (2, f"carousel: a token is printable ASCII characters, without spaces; {see}\n")


def test_who_is_not_known_is_told_how_to_say_it(server: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    server.script = refuse(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here")
    assert client.cli.main(["generate", "--prompt", "p", "--target", server.target]) == 1
    said = "carousel: the token is not known here; give a token with --token or in CAROUSEL_TOKEN (UNAUTHENTICATED)\n"
    assert capfd.readouterr().err == said


def test_a_new_token_is_shown_once_and_its_hash_is_the_line() -> None:
    made = [command("token", "--tenant", "alice", *options) for options in ((), (), ("--admin",))]
    keys = [each.stderr.removesuffix("\n") for each in made]
    assert len(set(keys)) == 3 and all(len(key) >= 43 and " " not in key for key in keys)
    for key, each, admin in zip(keys, made, (False, False, True), strict=True):
        assert json.loads(each.stdout) == {
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "tenant": "alice",
            "admin": admin,
        }
        assert each.returncode == 0 and each.stdout.count("\n") == 1


def test_a_tenant_that_no_server_would_take_gets_no_token() -> None:
    for tenant in ("", "a/b", "a\nb", "a" * 129):
        ended = command("token", "--tenant", tenant)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "a tenant is 1 to 128 printable characters, none of them '/'" in ended.stderr


class Callers(FakeServer):
    """Keeps the addresses that calls came from."""

    def __init__(self) -> None:
        self.peers: set[str] = set()
        super().__init__()

    def GetLoad(self, request, context):
        self.peers.add(context.peer())
        return super().GetLoad(request, context)


def test_each_client_has_a_connection_of_its_own():
    """Front ends share a port by connections: clients of one process would all come to the same one."""
    with Callers() as server, CarouselClient(server.target) as one, CarouselClient(server.target) as other:
        for each in (one, other, one):
            each.load()
        assert len(server.peers) == 2
