"""Properties of docker-compose.yml and its images that Compose itself does not check."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tolhouse import config
from tolhouse.integrations.vllm.versions import SUPPORTED
from tolhouse.testing import Process, process

import loadtest
from tests.commands import LOCAL

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SERVICES = yaml.safe_load(TEXT)["services"]
VLLM_TEXT = (ROOT / "deploy" / "compose.vllm.yml").read_text(encoding="utf-8")
VLLM = yaml.safe_load(VLLM_TEXT)["services"]
EVERY = SERVICES | VLLM  # with the override deploy/compose.vllm.yml
GPU = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yml").read_text(encoding="utf-8"))["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
NODES = [f"redis-cluster-{k}" for k in range(1, 7)]

# the images of vLLM, with the first two parts of their version
IMAGES = r"vllm/vllm-openai(?:-cpu)?:v(\d+\.\d+)"

each_service = pytest.mark.parametrize("name", EVERY)


def one_shot(name: str) -> bool:
    return EVERY[name].get("restart") == "no"


def parents(target: str) -> list[str]:
    """The stages of the Dockerfile that a target is built from, ending with the target."""
    base = re.search(rf"^FROM (\S+) AS {target}$", DOCKERFILE, re.MULTILINE)
    return [*parents(base[1]), target] if base else [target]


def parts(environment: dict[str, str]) -> set[str]:
    """The services with replicas, by the variables of the environment."""

    def count(service: dict) -> str:
        replicas = str(service["deploy"].get("replicas", 1))
        return re.sub(r"\$\{(\w+):-(\w+)\}", lambda m: environment.get(m[1], m[2]), replicas)

    return {name for name, s in SERVICES.items() if count(s) == "1" and "profiles" not in s}


def test_the_environment_selects_the_services() -> None:
    """The environment selects one Redis or a Redis Cluster, and monitoring; services without a
    profile are removed by `docker compose down`."""
    system = {"build", "lookup-1", "lookup-2", "worker-1", "worker-2", "gateway"}
    cluster, monitoring = (
        dict(
            re.findall(
                r"^(\w+)=(.*)$", (ROOT / "deploy" / name).read_text(encoding="utf-8"), re.MULTILINE
            )
        )
        for name in ("cluster.env", "monitoring.env")
    )
    assert system | {"redis"} == parts({})
    assert system | {*NODES, "cluster"} == parts(cluster)
    assert system | {"redis", "prometheus", "grafana"} == parts(monitoring)
    assert {"load"} == {name for name, service in SERVICES.items() if "profiles" in service}
    assert {*cluster, *monitoring} <= set(re.findall(r"\$\{(\w+):-", TEXT))


@each_service
def test_every_service_is_hardened(name: str) -> None:
    """No service runs as root, writes to its image, or has capabilities."""
    service = EVERY[name]
    assert (True, True, ["ALL"], ["no-new-privileges:true"]) == tuple(
        service[k] for k in ("read_only", "init", "cap_drop", "security_opt")
    )
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & set(service)
    if "build" in service:
        stage = DOCKERFILE.partition(f" AS {service['build']['target']}\n")[2].partition("\nFROM ")[
            0
        ]
        assert "\nUSER 10001:10001\n" in stage
    else:
        assert service["user"].partition(":")[0] not in {"root", "0"}


@each_service
def test_every_service_has_limits(name: str) -> None:
    """Every service has limits on processors, memory and processes."""
    assert {"cpus", "memory", "pids"} == set(EVERY[name]["deploy"]["resources"]["limits"])


@each_service
def test_every_long_running_service_has_a_health_check(name: str) -> None:
    """A long-running service has a health check and restarts; a one-shot service has neither."""
    assert one_shot(name) == ("healthcheck" not in EVERY[name])
    assert EVERY[name]["restart"] == ("no" if one_shot(name) else "unless-stopped")


@each_service
def test_services_wait_for_the_health_of_others(name: str) -> None:
    """A service waits for the health or the end of others, except for the cluster's setup, whose
    nodes have no health before it."""
    for other, how in EVERY[name].get("depends_on", {}).items():
        expected = (
            "service_started"
            if name == "cluster"
            else "service_completed_successfully"
            if one_shot(other)
            else "service_healthy"
        )
        assert expected == how["condition"]


@each_service
def test_only_servers_of_http_are_reachable(name: str) -> None:
    """Ports are bound to the loopback interface, and the network of all other services is
    internal."""
    service = EVERY[name]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
    networks = set(service["networks"])
    assert ("front" in networks) == (name in {"gateway", "vllm", "prometheus", "grafana", "load"})
    assert ("back" in networks) == (name not in {"grafana", "load"})
    assert {"internal": "${ISOLATED:-true}"} == yaml.safe_load(TEXT)["networks"]["back"]


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A lookup service over an empty store."""
    store = f"file://{tmp_path_factory.mktemp('store')}"
    with process("lookup", "--store", store, *LOCAL) as running:
        yield running


@pytest.mark.parametrize(
    "name", ["lookup-1", "lookup-2", "worker-1", "worker-2", "gateway", "vllm"]
)
def test_health_checks_fail_without_a_process(name: str, lookup: Process) -> None:
    """A health check passes if the process at its own port is healthy, and fails if nothing
    listens."""
    kind, (_, *command, port) = name.partition("-")[0], EVERY[name]["healthcheck"]["test"]
    listen = f"TOLHOUSE_{kind.upper()}_{'METRICS_' if kind != 'gateway' else ''}LISTEN"
    own = (
        EVERY[name]["command"] if kind == "vllm" else EVERY[name]["environment"][listen].split(":")
    )
    assert own[-1] == port
    command = [word.replace("$$", "$") for word in command]
    served = lookup.ready["metrics"].rpartition(":")[2]
    found = [subprocess.run([*command, at], check=False).returncode for at in (served, "1")]
    assert [True, False] == [code == 0 for code in found]


def test_every_variable_is_in_config() -> None:
    """Every TOLHOUSE_ variable that compose or an image sets is an option of config.py."""
    files = [
        TEXT,
        VLLM_TEXT,
        DOCKERFILE,
        (ROOT / "deploy" / "compose.gpu.yml").read_text(encoding="utf-8"),
    ]
    named = {name for text in files for name in re.findall(r"\bTOLHOUSE_[A-Z_]+", text)}
    assert named
    assert set() == named - config.variables()


def test_mounted_and_copied_paths_exist() -> None:
    """Every mounted or copied path exists; Compose would create an empty folder for a missing
    path."""
    volumes = [v for s in EVERY.values() for v in s.get("volumes", [])]
    sources = {v["source"] if isinstance(v, dict) else v.partition(":")[0] for v in volumes}
    named = set(yaml.safe_load(TEXT)["volumes"])
    assert named == {s for s in sources if not s.startswith(".")}
    assert [] == [s for s in sources - named if not (ROOT / s).exists()]
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / p).exists() and f"!{p}" in kept for p in path.split())


def test_redis_creates_no_anonymous_volume() -> None:
    """Every Redis mounts something at /data, where its image declares an anonymous volume."""
    for name, service in SERVICES.items():
        if service["image"].startswith("redis:"):
            places = [*service.get("tmpfs", []), *service.get("volumes", [])]
            assert any(place.rpartition(":")[2] == "/data" for place in places), name


def test_there_are_no_secrets() -> None:
    """No password, token or key has a value in the file, and no URL has a user."""
    for service in EVERY.values():
        values = {**service.get("environment", {}), **service.get("build", {}).get("args", {})}
        assert [] == [
            k
            for k, v in values.items()
            if re.search(r"PASSWORD|SECRET|TOKEN|KEY", k) and not re.fullmatch(r"\$\{\w+(:-)?\}", v)
        ]
    assert None is re.search(r"//[^/\s\"}]*@|requirepass", TEXT)


def test_every_replica_is_listed() -> None:
    """Workers list both lookup replicas, the gateway both workers, and the cluster's setup all
    nodes."""

    def of(kind: str, port: int) -> str:
        return ",".join(f"{name}:{port}" for name in SERVICES if name.startswith(f"{kind}-"))

    assert {of("lookup", 50051)} == {
        *(SERVICES[w]["environment"]["TOLHOUSE_WORKER_ROWS"] for w in ("worker-1", "worker-2")),
        VLLM["vllm"]["environment"]["TOLHOUSE_VLLM_ROWS"],
    }
    assert of("worker", 50052) == SERVICES["gateway"]["environment"]["TOLHOUSE_GATEWAY_WORKERS"]
    assert NODES == SERVICES["cluster"]["command"][2:] == list(SERVICES["cluster"]["depends_on"])
    assert NODES == [SERVICES[node]["hostname"] for node in NODES]


def test_images_without_a_model_have_no_torch() -> None:
    """Only the images of worker and build are based on the layer with torch."""
    with_torch = {
        n for n, s in SERVICES.items() if "build" in s and "model" in parents(s["build"]["target"])
    }
    assert {"build", "worker-1", "worker-2"} == with_torch


def test_images_are_pinned() -> None:
    """Images that are not built here have a version."""
    assert [] == [
        s["image"]
        for s in SERVICES.values()
        if "build" not in s and not re.search(r":v?\d", s["image"])
    ]


def test_each_worker_gets_a_gpu() -> None:
    """The GPU override reserves a GPU for every worker and nothing else."""
    assert {name for name in SERVICES if name.startswith("worker-")} == set(GPU)
    for service in GPU.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert ("nvidia", ["gpu"]) == (device["driver"], device["capabilities"])


def test_vllm_runs_without_gateway_and_workers() -> None:
    """vLLM depends on the lookup services and the build, and has the supported version of vLLM."""
    assert {"build", "lookup-1", "lookup-2"} == set(VLLM["vllm"]["depends_on"])
    assert {SUPPORTED[-1]} == {
        version for text in (VLLM_TEXT, DOCKERFILE) for version in re.findall(IMAGES, text)
    }


def test_vllm_has_time_for_requests_in_flight() -> None:
    """vLLM finishes requests for less than the time after which its container is killed."""
    command, grace = VLLM["vllm"]["command"], VLLM["vllm"]["stop_grace_period"]
    seconds = int(command[command.index("--shutdown-timeout") + 1])
    assert 0 < seconds < int(grace.removesuffix("s"))


def test_the_allocator_settings_are_the_same_everywhere() -> None:
    """`make` sets the same allocator variables as the images and the benchmarks."""
    images = dict(re.findall(r"(MALLOC_\w+)=(\d+)", DOCKERFILE))
    made = dict(
        re.findall(r"export (MALLOC_\w+) := (\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    )
    assert loadtest.ALLOCATOR == images == made
