"""What a server says at its start about who can reach it, and that it is safe as it was told, end to end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from client import CarouselClient
from scheduler.config import ServeConfig
from scheduler.core import CoreConfig
from scheduler.frontend.config import TlsFiles
from scheduler.supervisor import exposure, is_loopback
from tests.helpers.certificates import Authority
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, Server, eventually

TLS = TlsFiles(certificate="c", key="k")
MUTUAL = TlsFiles(certificate="c", key="k", client_ca="a")
READABLE, ANYBODY = "everything can be read on the way", "anybody who reaches it can use it"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_is_nobody_elses(host: str) -> None:
    assert is_loopback(host)
    assert exposure(ServeConfig(core=CoreConfig(), model="m", served_model_name="m", host=host)) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.example.org", "localhost.example.org", "::1234"])
def test_what_listens_elsewhere_says_what_is_open(host: str) -> None:
    def said(tls: TlsFiles | None = None, key_file: str = "") -> tuple[bool, bool]:
        config = ServeConfig(core=CoreConfig(), model="m", served_model_name="m", host=host, tls=tls, key_file=key_file)
        text = exposure(config)
        assert not text or text.startswith(f"listening on {host} without")
        return READABLE in text, ANYBODY in text

    assert said() == (True, True)
    assert said(tls=TLS) == (False, True)
    assert said(key_file="tokens") == (True, False)
    assert said(tls=TLS, key_file="tokens") == said(tls=MUTUAL) == (False, False)


def test_a_server_with_tls_and_tokens_serves_who_has_one_and_keeps_it_secret(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.vouch_for("server")
    made = subprocess.run([CAROUSEL, "token", "--tenant", "alice", "--admin"], capture_output=True, text=True, timeout=30)
    key, tokens = made.stderr.strip(), tmp_path / "tokens.jsonl"
    tokens.write_text(made.stdout)
    model = make_checkpoint(tmp_path / "model", "llama", tokenizer=True)
    files = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key), "--tokens", str(tokens))
    server = Server("--model", str(model), "--device", "sim", "--frontends", "2", "--log-level", "debug", *files)
    try:
        assert eventually(lambda: "is served on" in server.log(), 60), server.log()
        target = server.log().partition("is served on ")[2].split()[0]
        with CarouselClient(target, tls_ca=authority.file, token=key) as client:
            client.wait_ready(20)
            assert client.load().running_requests == 0
        command = [
            CAROUSEL,
            "generate",
            "--prompt",
            "x",
            "--max-tokens",
            "3",
            "--target",
            target,
            "--tls-ca",
            str(authority.file),
        ]
        for token, code, said in ((key, 0, ""), (f"{key}0", 1, "the token is not known here"), ("", 1, "a token is needed")):
            environment = os.environ | {"CAROUSEL_TOKEN": token}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
            assert done.returncode == code and said in done.stderr, done.stderr
        children = [pid for pids in server.children().values() for pid in pids]
        seen = [(Path("/proc") / str(pid) / "cmdline").read_text() for pid in (server.process.pid, *children)]
        assert len(seen) >= 5 and not any(key in words for words in seen)
    finally:
        server.stop()
    assert key not in server.log() and "WARNING" not in server.log(), server.log()
