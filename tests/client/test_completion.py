"""Completion of the `carousel` command in the shells that click knows, and help that shows an example."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import client.cli

REPO = Path(__file__).parents[2]


@pytest.fixture
def complete(monkeypatch, capsys):
    def run(shell: str, line: str) -> list[str]:
        """What the shell's script is told for the last word of the line."""
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
        monkeypatch.setenv("_CAROUSEL_COMPLETE", f"{shell}_complete")
        with pytest.raises(SystemExit) as ended:
            client.cli.main([])
        assert ended.value.code == 0
        return capsys.readouterr().out.replace(",", "\n").replace("\t", "\n").split("\n")

    return run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_options_and_their_values_are_completed(complete, shell):
    assert {"serve", "simulate"} <= set(complete(shell, "carousel s"))
    assert "--max-batch-rows" in complete(shell, "carousel serve --max-b")
    assert {"auto", "cpu", "cuda", "sim"} <= set(complete(shell, "carousel batch in out --device "))
    assert "dir" in complete(shell, "carousel serve --model ")
    assert "file" in complete(shell, "carousel serve --tls-cert ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_shown_for_a_shell_that_is_named_or_runs(shell, capsys, monkeypatch):
    assert client.cli.main(["--show-completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_CAROUSEL_COMPLETE={shell}_complete" in script
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert client.cli.main(["--show-completion"]) == 0
    assert capsys.readouterr().out == script


def test_an_unknown_shell_is_wrong_usage(capsys, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert client.cli.main(["--show-completion"]) == 2
    assert capsys.readouterr().err.startswith("carousel: --show-completion: say for which shell: bash, zsh, fish")


STARTS = {"bash": ".bashrc", "zsh": ".zshrc"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_is_installed_once_and_what_was_there_stays(shell, capsys, monkeypatch, tmp_path):
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    start = tmp_path / STARTS.get(shell, "none")
    if shell in STARTS:
        start.write_text("alias ll='ls -l'")
    for _ in range(2):
        assert client.cli.main(["--install-completion", shell]) == 0
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and path != start]
    assert f"{shell}_complete" in file.read_text() and str(file) in capsys.readouterr().out
    if shell in STARTS:
        lines = start.read_text().splitlines()
        assert len(lines) == 2 and lines[0] == "alias ll='ls -l'" and str(file) in lines[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="it is bash that completes")
def test_bash_completes_with_what_was_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert client.cli.main(["--install-completion", "bash"]) == 0
    carousel = Path(sys.executable).parent / "carousel"
    asks = (
        f". {tmp_path}/.bashrc; COMP_WORDS=(carousel serve --device c); COMP_CWORD=3;"
        f' _carousel_completion {carousel}; echo "${{COMPREPLY[@]}}"; complete -p carousel'
    )
    told = subprocess.run(["bash", "--norc", "-c", asks], capture_output=True, text=True, check=True, timeout=20).stdout
    assert told.splitlines()[0] == "cpu cuda" and "_carousel_completion carousel" in told


def own_help(name: str, capfd: pytest.CaptureFixture[str]) -> str:
    command = client.cli.carousel.commands[name]
    if command.context_settings.get("help_option_names") == []:  # it hands --help on
        asked = [sys.executable, "-m", "client", name, "--help"]
        return subprocess.run(asked, cwd=REPO, capture_output=True, text=True, check=True, timeout=20).stdout
    with click.Context(command, info_name=f"carousel {name}") as context:
        return command.get_help(context)


@pytest.mark.parametrize("name", sorted(client.cli.carousel.commands))
def test_each_commands_help_has_an_example(name, capfd):
    said = own_help(name, capfd)
    _, _, examples = said.partition("Example")
    assert f"carousel {name}" in examples
