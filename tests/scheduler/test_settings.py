"""Where an option's value comes from: flags, environment, a file, defaults; and what is said of values that can't be used."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from scheduler.main import config_from, serve_command
from scheduler.settings import keys, nearest, printed, sources, variable


@pytest.fixture(autouse=True)
def _nothing_of_ours_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in keys(serve_command):
        monkeypatch.delenv(variable(key), raising=False)


def context(*options: str) -> click.Context:
    return serve_command.make_context("serve", list(options))


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "carousel.toml"
    path.write_text(text)
    return str(path)


def test_flag_before_environment_before_file_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, 'model = "from/file"\nport = 1\nfrontends = 2\nmax-batch-rows = 3\n')
    monkeypatch.setenv("CAROUSEL_PORT", "4")
    monkeypatch.setenv("CAROUSEL_FRONTENDS", "5")
    ctx = context("--config", path, "--frontends", "6")
    options = ctx.params
    assert (options["frontends"], options["port"], options["max_batch_rows"], options["block_size"]) == (6, 4, 3, 16)
    assert sources(ctx) == {
        "config": "--config",
        "model": f"{path}:1",
        "max_batch_rows": f"{path}:4",
        "port": "CAROUSEL_PORT",
        "frontends": "--frontends",
    }
    assert "frontends=6 (--frontends)" in config_from(options, sources(ctx)).chosen


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAROUSEL_CONFIG", file(tmp_path, 'model = "m"'))
    assert context().params["model"] == "m"


def test_every_option_can_be_set_by_each_of_the_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, option in keys(serve_command).items():
        if key == "config":
            continue
        value = _some(option)
        from_file = context("--config", file(tmp_path, f"{key} = {_toml(value)}")).params[option.name]
        words = value if isinstance(value, list) else [value]
        flag = max(option.opts, key=len)
        from_flag = context(*([flag] if value is True else [word for each in words for word in (flag, str(each))])).params
        monkeypatch.setenv(variable(key), " ".join(map(str, words)))
        from_environment = context().params[option.name]
        monkeypatch.delenv(variable(key))
        assert from_file == from_flag[option.name] == from_environment, key
        assert from_file not in (None, False, ()), key


def _some(option: click.Option) -> Any:
    """A value that it takes."""
    kind = option.type
    if option.is_flag:
        return True
    if isinstance(kind, click.Choice):
        return kind.choices[-1]
    if isinstance(kind, click.IntRange):
        return min(max(kind.min or 0, 17), kind.max or 17)
    if isinstance(kind, click.FloatRange):
        return max(kind.min or 0, 17.5)
    return ["a", "b:weight=2"] if option.multiple else "text"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", ":1: prot is no option: did you mean port?"),
        ("\n# all\nmax_batch_row = 1", ":3: max_batch_row is no option: did you mean max_batch_rows?"),
        ("zzz = 1", ":1: zzz is no option"),
        ("config = 'other.toml'", ":1: config is no option"),
        ("[server]\nport = 1", ":1: server is no option"),
        ("port = '1'", ":1: port must be a whole number, not '1'"),
        ("port = 1.5", ":1: port must be a whole number, not 1.5"),
        ("port = true", ":1: port must be a whole number, not True"),
        ("port = 70000", ":1: port: 70000 is not in the range 0<=x<=65535"),
        ("no_prefix_caching = 1", ":1: no_prefix_caching must be true or false, not 1"),
        ("model = 5", ":1: model must be a text, not 5"),
        ("device = 'gpu'", ":1: device: 'gpu' is not one of"),
        ("tenant = 'a'", ":1: tenant must be a list, each a text, not 'a'"),
        ("tenant = [1]", ":1: tenant must be a list, each a text, not 1"),
        ("port = [1]", ":1: port must be a whole number, not [1]"),
        ("port = 1\nport = 2", "is not TOML"),
        ("max_batch_rows = 1\nmax-batch-rows = 2", ":2: max-batch-rows is given twice"),
        ("port =", "is not TOML"),
    ],
)
def test_what_a_file_may_not_say_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(click.UsageError) as caught:
        context("--config", path)
    assert path in caught.value.message and said in caught.value.message and "\n" not in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match=r"nowhere\.toml: No such file"):
        context("--config", str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CAROUSEL_PORT", "many", "CAROUSEL_PORT in the environment: 'many' is not a valid"),
        ("CAROUSEL_PORT", "tcp://10.0.0.1:50051", "enableServiceLinks: false"),
        ("CAROUSEL_DEVICE", "gpu", "CAROUSEL_DEVICE in the environment: 'gpu' is not one of"),
        ("CAROUSEL_MAX_BATCH_ROW", "1", "is no option: did you mean CAROUSEL_MAX_BATCH_ROWS?"),
        ("CAROUSEL_MODLE", "m", "did you mean CAROUSEL_MODEL?"),
        ("CAROUSEL_PROT", "1", "did you mean CAROUSEL_PORT?"),
    ],
)
def test_what_the_environment_may_not_say_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(click.UsageError) as caught:
        context("--model", "m")
    assert said in caught.value.message and name in caught.value.message


def test_an_empty_variable_is_none_and_those_of_others_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_kubernetes = ("SERVICE_HOST", "SERVICE_PORT_GRPC", "PORT_50051_TCP_ADDR", "METRICS_SERVICE_PORT", "METRICS_PORT_1_TCP")
    for name in ("TOKEN", *of_kubernetes):
        monkeypatch.setenv(f"CAROUSEL_{name}", "x")
    monkeypatch.setenv("CAROUSEL_PORT", "")
    assert context("--model", "m").params["port"] == 50051
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CAROUSEL_HOME_PAGE", "x")
    assert context("--model", "m").params["port"] == 50051
    assert capsys.readouterr().err == "carousel: CAROUSEL_HOME_PAGE in the environment is no option, and is left alone\n"


def test_what_is_printed_is_a_file_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAROUSEL_TARGET_ITL_MS", "12.5")
    ctx = context("--model", 'a "quoted" \\ name', "--tenant", "a", "--tenant", "*:weight=2", "--no-prefix-caching")
    lines = list(printed(ctx))
    assert "target_itl_ms = 12.5  # CAROUSEL_TARGET_ITL_MS" in lines and "port = 50051  # default" in lines
    assert "# max_model_len =  # default: the model's" in lines
    monkeypatch.delenv("CAROUSEL_TARGET_ITL_MS")
    again = context("--config", file(tmp_path, "\n".join(lines)))
    assert {**again.params, "config": None} == ctx.params
    named = {line.removeprefix("# ").partition(" ")[0] for line in lines[1:]}
    assert named == set(keys(serve_command)) - {"config"}
    assert tomllib.loads("\n".join(lines))["tenant"] == ["a", "*:weight=2"]


def test_the_nearest_name() -> None:
    assert nearest("modle", ["model", "port"]) == "model"
    assert nearest("xyz", ["model", "port"]) == ""
