"""The dashboard and the alerts ask only for what a live server exports; with Prometheus installed, it answers every panel."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from tests.helpers.scrape import Measured, generate, load, measured, refused, request
from tests.helpers.server import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "carousel.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
SCRAPE = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
OF_PROMETHEUS = {"instance", "job", "le"}  # labels that it adds itself, or that every histogram has

_METRIC = re.compile(r"\b((?:carousel|vllm)[a-z0-9_:]+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def queries() -> list[tuple[str, str]]:
    """(whose, expression)."""
    panels = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
    return panels + [(rule["alert"], rule["expr"]) for rule in ALERTS]


@pytest.fixture(scope="module")
def busy() -> Iterator[Measured]:
    """Small enough that requests preempt one another."""
    with measured("--num-blocks", "24", "--max-model-len", "256", "--swap-gib", "0") as seen:
        load(seen.server.target, [request(100, tenant) for tenant in ("alice", "bob") for _ in range(3)])
        assert refused(seen.server.target) is grpc.StatusCode.INVALID_ARGUMENT
        assert seen.settles("carousel_requests_ended_total", 7)
        yield seen


@pytest.mark.parametrize(("whose", "expression"), queries(), ids=lambda value: value if len(value) < 30 else "")
def test_every_query_names_metrics_and_labels_that_a_loaded_server_exports(busy: Measured, whose: str, expression: str) -> None:
    exported = busy.scrape()
    used = _METRIC.findall(expression)
    assert used or expression.startswith("up")
    labels: set[str] = set()
    for name, selector in used:
        assert name in exported, f"{whose}: {name} is not exported"
        known = {label for theirs, _ in exported[name] for label in theirs} | OF_PROMETHEUS
        labels |= known
        assert {*_LABEL.findall(selector)} <= known, f"{whose}: {name} has only {known}"
    for group in _BY.findall(expression):
        assert {label.strip() for label in group.split(",")} <= labels, whose


def test_every_legend_and_every_alert_uses_labels_that_its_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = {label.strip() for group in _BY.findall(target["expr"]) for label in group.split(",")}
            is_plain = not re.search(r"\b(sum|min|max)\b", target["expr"])
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= kept | ({"instance"} if is_plain else set()), panel["title"]


def test_panels_are_numbered_once_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


# --------------------------------------------------------------------------------------------------- with a real Prometheus


class Prometheus:
    """Debian's own, scraping the target once a second."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        job = {"job_name": SCRAPE["scrape_configs"][0]["job_name"], "static_configs": [{"targets": [target]}]}
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._process = subprocess.Popen([*command, f"--web.listen-address={self.address}"], stderr=subprocess.DEVNULL)

    def query(self, expression: str) -> list[dict[str, Any]]:
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{question}", timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        result: list[dict[str, Any]] = told["data"]["result"]
        return result

    def has(self, expression: str) -> bool:
        try:
            return bool(self.query(expression))
        except OSError:  # not up yet
            return False

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def filled(expression: str) -> str:
    """As Grafana fills it in."""
    return expression.replace("$__rate_interval", "30s").replace("$__range", "5m").replace("$instance", ".*")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)")
def test_a_real_prometheus_answers_every_panel(busy: Measured, tmp_path: Path) -> None:
    target = busy.url.removeprefix("http://").removesuffix("/metrics")
    prometheus, stop = Prometheus(tmp_path, target), threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            load(busy.server.target, [request(60, tenant) for tenant in ("alice", "bob") for _ in range(3)])
            refused(busy.server.target)

    loading = threading.Thread(target=keep_busy)
    loading.start()
    try:
        assert eventually(lambda: prometheus.has("rate(carousel_steps_total[10s]) > 0"), 40)
        for panel in PANELS:
            for told in panel["targets"]:
                assert prometheus.has(filled(told["expr"])), f"{panel['title']}: {told['expr']} has no answer"
        assert prometheus.has('up{job="carousel"} == 1')
        assert float(prometheus.query(filled(_expression("Output tokens")))[0]["value"][1]) > 0
        assert prometheus.query("carousel_ready == 0") == []
        for rule in ALERTS:
            prometheus.query(rule["expr"])  # raises when it can't be evaluated
    finally:
        stop.set()
        loading.join()
        prometheus.close()
    assert generate(busy.server.target, request(1)) == 1


def _expression(title: str) -> str:
    [panel] = [panel for panel in PANELS if panel["title"] == title]
    expression: str = panel["targets"][0]["expr"]
    return expression


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
def test_promtool_finds_nothing_wrong_with_the_configuration() -> None:
    command = ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
