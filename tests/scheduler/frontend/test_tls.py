"""TLS of a real front end: who is served, who is not, and which files it starts with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client.cli
from client import CarouselClient, CarouselError, ServerUnreachableError
from scheduler.errors import StartError
from scheduler.frontend import tls
from scheduler.frontend.config import TlsFiles
from tests.helpers import certificates
from tests.helpers.certificates import Authority, Pair
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend, running

_TOGETHER = "TLS needs --tls-cert and --tls-key together; --tls-client-ca goes with them"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "theirs")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.vouch_for("server")


@pytest.fixture(scope="module")
def encrypted(shared_core: FakeCore, model_dir: Path, authority: Authority, server: Pair) -> Iterator[Frontend]:
    files, credentials = certificates.tls(server), certificates.credentials(authority)
    with running(model_dir, shared_core.endpoint, tls=files, credentials=credentials) as frontend:
        frontend.wait_serving()
        yield frontend


@pytest.fixture(scope="module")
def mutual(shared_core: FakeCore, model_dir: Path, authority: Authority, server: Pair) -> Iterator[Frontend]:
    files, own = certificates.tls(server, authority.file), authority.vouch_for("us")
    credentials = certificates.credentials(authority, own)
    with running(model_dir, shared_core.endpoint, tls=files, credentials=credentials) as frontend:
        frontend.wait_serving()
        yield frontend


def generated(client: CarouselClient) -> int:
    """Tokens of a whole call."""
    with client:
        stream = client.generate("fox", max_tokens=3, timeout_s=10)
        return sum(len(event.delta.token_ids) for event in stream)


def test_a_client_that_trusts_the_servers_authority_is_served(encrypted: Frontend, authority: Authority) -> None:
    assert generated(CarouselClient(encrypted.target, tls_ca=authority.file)) == 3
    with CarouselClient(encrypted.target, tls_ca=str(authority.file), token="unused") as client:
        client.wait_ready(10)
        assert client.load().total_blocks


def test_a_client_without_tls_is_not_served(encrypted: Frontend) -> None:
    with pytest.raises(CarouselError) as raised:
        generated(CarouselClient(encrypted.target))
    assert raised.value.code.name == "UNAVAILABLE"


def test_a_server_that_nobody_trusted_vouches_for_gets_nothing(encrypted: Frontend, stranger: Authority) -> None:
    with pytest.raises(ServerUnreachableError):
        generated(CarouselClient(encrypted.target, tls_ca=stranger.file))


def test_a_client_with_a_certificate_is_served_by_mutual_tls(mutual: Frontend, authority: Authority) -> None:
    own = authority.vouch_for("client")
    assert generated(CarouselClient(mutual.target, tls_ca=authority.file, tls_cert=own.certificate, tls_key=own.key)) == 3


def test_without_a_certificate_or_with_a_strangers_mutual_tls_serves_nobody(
    mutual: Frontend, authority: Authority, stranger: Authority
) -> None:
    own = stranger.vouch_for("client")
    for options in ({}, {"tls_cert": own.certificate, "tls_key": own.key}):
        with pytest.raises(CarouselError) as raised:
            generated(CarouselClient(mutual.target, tls_ca=authority.file, **options))
        assert raised.value.code.name == "UNAVAILABLE"


def test_the_command_says_where_to_look_when_the_two_can_not_agree(
    encrypted: Frontend, mutual: Frontend, frontend: Frontend, authority: Authority, stranger: Authority, capfd: Any
) -> None:
    ours, theirs = ("--tls-ca", str(authority.file)), ("--tls-ca", str(stranger.file))
    for server, options in ((encrypted, ()), (encrypted, theirs), (mutual, ours), (frontend, ours)):
        assert client.cli.main(["generate", "--prompt", "x", "--target", server.target, *options]) == 1
        said = capfd.readouterr().err.splitlines()[-1]  # grpc itself may have written before
        assert said.startswith(f"carousel: no server answers at {server.target} in the way it was asked: with or without TLS")


# ------------------------------------------------------------------------------------------------------------- the files


def test_files_that_belong_together_are_read(authority: Authority, server: Pair) -> None:
    material = tls.read(certificates.tls(server, authority.file))
    assert material == (server.certificate.read_bytes(), server.key.read_bytes(), authority.file.read_bytes())
    assert tls.read(certificates.tls(server)).client_ca is None


def test_files_that_can_not_be_used_are_named(authority: Authority, server: Pair, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("a secret that was meant to be elsewhere\n")
    secret = authority.vouch_for("secret", password="hush")
    other = authority.vouch_for("other")

    def refusal(certificate: Path, key: Path, client_ca: str = "") -> str:
        with pytest.raises(StartError) as raised:
            tls.read(TlsFiles(certificate=str(certificate), key=str(key), client_ca=client_ca))
        said = str(raised.value)
        assert "\n" not in said and "secret that" not in said
        return said

    missing = tmp_path / "nowhere.pem"
    assert refusal(missing, server.key) == f"--tls-cert {missing}: No such file or directory"
    assert refusal(server.certificate, tmp_path) == f"--tls-key {tmp_path}: Is a directory"
    assert refusal(server.certificate, server.key, str(missing)) == f"--tls-client-ca {missing}: No such file or directory"
    assert refusal(server.certificate, other.key) == f"--tls-key {other.key} is not the key of --tls-cert {server.certificate}"
    assert "without a password" in refusal(secret.certificate, secret.key)
    for pair in (Pair(text, server.key), Pair(server.certificate, text), Pair(server.key, server.certificate)):
        assert refusal(pair.certificate, pair.key).endswith("PEM files without a password")
    assert refusal(server.certificate, server.key, str(text)) == f"--tls-client-ca {text} must hold certificates, as PEM"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--tls-cert", "no.pem", "--tls-key", "no.key"), 1, "--tls-cert no.pem: No such file or directory"),
        (("--tls-cert", "no.pem"), 2, _TOGETHER),
        (("--tls-client-ca", "no.pem"), 2, _TOGETHER),
        (("--tokens", "no.jsonl"), 1, "--tokens no.jsonl: No such file or directory"),
    ],
)
def test_a_server_that_can_not_be_safe_as_it_is_told_does_not_start(options: tuple[str, ...], code: int, said: str) -> None:
    command = [sys.executable, "-m", "scheduler", "--model", "some/model", "--port", "0", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr.splitlines()) == (code, [f"carousel: {said}"])
