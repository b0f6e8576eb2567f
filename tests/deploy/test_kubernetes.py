"""The manifests are valid by Kubernetes' own schemas, and agree with the images, with one another, and with our options."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.main import serve_command
from tests.helpers.scrape import measured
from worker.main import parse

kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.29", "1.37")  # the oldest that has all we use, and the newest that the schemas know
OVERLAYS = ("cpu", "gpu")
Manifest = dict[str, Any]


def manifests(folder: str) -> Iterator[tuple[str, Manifest]]:
    for path in sorted((FOLDER / folder).glob("*.yaml")):
        if path.name != "kustomization.yaml":
            for each in yaml.safe_load_all(path.read_text()):
                yield f"{folder}/{path.name}/{each['kind']}/{each['metadata']['name']}", each


ALL = {name: each for folder in ("base", *OVERLAYS) for name, each in manifests(folder)}
WORKERS = {overlay: ALL[f"{overlay}/worker.yaml/Deployment/carousel-worker"] for overlay in OVERLAYS}
SCHEDULER = ALL["base/scheduler.yaml/StatefulSet/carousel-scheduler"]
PODS = {"scheduler": SCHEDULER, **WORKERS}


def of(kind: str, name: str) -> Manifest:
    [found] = [each for each in ALL.values() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def arguments(workload: Manifest) -> list[str]:
    [container] = pod(workload)["containers"]
    return [argument.replace("$(CAROUSEL_MODEL)", "/model") for argument in container["args"]]


def labels(workload: Manifest) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


# --------------------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_a_manifest_is_what_kubernetes_takes(name: str, version: str) -> None:
    kubernetes_validate.validate(ALL[name], version, strict=True)


def misspelt() -> Iterator[Manifest]:
    wrong = copy.deepcopy(SCHEDULER)
    wrong["spec"]["template"]["spec"]["enableServiceLink"] = False
    yield wrong
    wrong = copy.deepcopy(SCHEDULER)
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProbe"] = {"grpc": {"prot": 50051}}
    yield wrong
    wrong = copy.deepcopy(of("HorizontalPodAutoscaler", "carousel-worker"))
    wrong["spec"]["maxReplicas"] = "sixteen"
    yield wrong


@pytest.mark.parametrize("wrong", list(misspelt()), ids=["unknown key", "unknown key in a probe", "wrong type"])
def test_a_misspelt_one_is_refused(wrong: Manifest) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


# ------------------------------------------------------------------------------------------------------------- agreement


def test_every_file_is_a_resource_of_its_kustomization() -> None:
    for folder in ("base", *OVERLAYS):
        told = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
        own = {path.name for path in (FOLDER / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in told["resources"] if name != "../base"} == own
        assert ("../base" in told["resources"]) == (folder != "base")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_each_overlay_and_the_result_is_valid(overlay: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / overlay)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    for each in rendered:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    [config] = [each for each in rendered if each["kind"] == "ConfigMap"]
    for each in rendered:
        if each["kind"] in ("Deployment", "StatefulSet"):
            assert pod(each)["containers"][0]["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]


def test_options_are_options_and_agree_with_ports_and_times() -> None:
    told = serve_command.make_context("serve", [*arguments(SCHEDULER), "--model=/model"]).params
    [container] = pod(SCHEDULER)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    inner = int(told["inner_address"].rsplit(":", 1)[1])
    assert ports == {"grpc": told["port"], "workers": inner, "metrics": told["metrics_port"]}
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(SCHEDULER)["terminationGracePeriodSeconds"] >= pause_s + told["drain_timeout"] + 10
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == told["port"]
    for workload in WORKERS.values():
        config, _, _ = parse(arguments(workload))
        assert config.connect == f"tcp://carousel-internal:{inner}"


def test_only_readiness_waits_for_a_worker() -> None:
    from scheduler.frontend.server.health import LIVENESS

    [container] = pod(SCHEDULER)["containers"]
    assert "service" not in container["readinessProbe"]["grpc"]
    assert {container[probe]["grpc"]["service"] for probe in ("startupProbe", "livenessProbe")} == {LIVENESS}
    assert of("Service", "carousel-internal")["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("name", PODS)
def test_pods_are_locked_down(name: str) -> None:
    spec = pod(PODS[name])
    assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "Always would open the journal to the group"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] is True and locked["allowPrivilegeEscalation"] is False
        assert locked["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", PODS)
def test_what_is_mounted_is_a_volume_and_covers_what_is_written(name: str) -> None:
    workload = PODS[name]
    claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"] for volume in pod(workload)["volumes"]} | claimed
    [container] = pod(workload)["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable - {"/var/lib/carousel"} == {"/tmp", "/var/cache/carousel"}


def test_images_have_the_projects_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    for workload in PODS.values():
        for container in [*pod(workload)["containers"], *pod(workload).get("initContainers", [])]:
            target, tag = re.fullmatch(r"carousel-([a-z-]+):(.*)", container["image"]).groups()  # type: ignore[union-attr]
            assert tag == version and f" AS {target}\n" in dockerfile


def test_selectors_find_the_pods_that_they_mean() -> None:
    for workload in PODS.values():
        assert workload["spec"]["selector"]["matchLabels"] == labels(workload)
    for service in ("carousel", "carousel-internal"):
        spec = of("Service", service)["spec"]
        assert spec["selector"] == labels(SCHEDULER)
        [container] = pod(SCHEDULER)["containers"]
        assert {port["targetPort"] for port in spec["ports"]} <= {port["name"] for port in container["ports"]}
    worker = labels(WORKERS["cpu"])
    assert labels(WORKERS["gpu"]) == worker
    assert of("PodDisruptionBudget", "carousel-worker")["spec"]["selector"]["matchLabels"] == worker
    assert of("NetworkPolicy", "carousel-worker")["spec"]["podSelector"]["matchLabels"] == worker
    ingress = of("NetworkPolicy", "carousel-scheduler")["spec"]["ingress"]
    assert [rule["from"][0]["podSelector"].get("matchLabels") for rule in ingress][1] == worker
    assert SCHEDULER["spec"]["serviceName"] == "carousel-internal"


def test_each_side_of_the_link_has_its_own_secret() -> None:
    secrets = {
        name: [volume["secret"]["secretName"] for volume in pod(workload)["volumes"] if "secret" in volume]
        for name, workload in PODS.items()
    }
    assert secrets == {
        "scheduler": ["carousel-core-keys"],
        "cpu": ["carousel-worker-keys"],
        "gpu": ["carousel-worker-keys"],
    }
    told = (FOLDER / "README.md").read_text()
    assert "carousel-core-keys --from-file=keys/core.key_secret --from-file=keys/worker.key\n" in told
    assert "carousel-worker-keys --from-file=keys/worker.key_secret --from-file=keys/core.key\n" in told


def test_the_autoscaler_scales_the_workers_by_a_metric_that_a_server_exports() -> None:
    spec = of("HorizontalPodAutoscaler", "carousel-worker")["spec"]
    target = spec["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", WORKERS["cpu"]["metadata"]["name"])
    assert all("replicas" not in workload["spec"] for workload in WORKERS.values()), "it would be set back at each apply"
    [metric] = [each["object"] for each in spec["metrics"]]
    assert of("Service", metric["describedObject"]["name"])
    name = metric["metric"]["name"]
    assert f"seriesQuery: {name}{{" in (FOLDER / "base" / "scaling.yaml").read_text()
    with measured() as server:
        assert name in server.scrape()


def test_the_gpu_worker_asks_for_one_the_cpu_worker_for_none() -> None:
    [gpu], [cpu] = (pod(WORKERS[name])["containers"] for name in ("gpu", "cpu"))
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and "--device=cuda" in gpu["args"]
    assert "nvidia" not in json.dumps(cpu) and "--device=cpu" in cpu["args"]
