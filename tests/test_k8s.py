"""The Kubernetes manifests as kustomize renders them: right for the schemas, and in what those can't see."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import manifests
from tests.manifests import CHECKS, Check, Document, connections, render

K8S = Path(__file__).parent.parent / "deploy" / "k8s"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Document]]:
    """Both overlays, the loader beside `local`, and `local` with all components."""
    folder = tmp_path_factory.mktemp("k8s")
    shutil.copytree(K8S, folder, dirs_exist_ok=True)
    local = folder / "overlays" / "local" / "kustomization.yaml"
    local.write_text(
        local.read_text()
        + "components: [../../components/monitoring, ../../components/traces, ../../components/auth]\n"
    )
    found = {name: render(K8S / "overlays" / name) for name in ("local", "gpu")}
    found["local"] += yaml.safe_load_all((K8S / "loader.yaml").read_text())
    return found | {"monitored": render(folder / "overlays" / "local")}


@pytest.mark.parametrize("name", ["local", "monitored", "gpu"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_manifests_are_right(rendered: dict[str, list[Document]], name: str, check: Check) -> None:
    """No check finds anything in any overlay."""
    assert [] == list(check(rendered[name]))


SYSTEM = {
    "gateway > worker:grpc",
    "worker > lookup:grpc",
    "anyone > gateway:http",
    "prometheus > gateway:http",
    "kuberay > gateway:http",
}
SCRAPED = {"prometheus > lookup:metrics", "prometheus > worker:metrics"}
TRACED = {f"{service} > collector:otlp" for service in ("lookup", "worker", "gateway")}
REDIS = {
    "redis > redis:redis",
    "redis > redis:bus",
    "lookup > redis:redis",
    "build > redis:redis",
    "redis-form > redis:redis",
}
RAY = {f"build > build:{port}" for port in ("gcs", "dashboard", "client", "agent", "others")} | {
    "kuberay > build:dashboard"
}


def names(*pods: str) -> set[str]:
    return {f"{pod} > dns:dns" for pod in pods}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local", SYSTEM | names("lookup", "worker", "gateway", "build", "loader")),
        ("monitored", SYSTEM | SCRAPED | TRACED | names("lookup", "worker", "gateway", "build")),
        (
            "gpu",
            SYSTEM
            | SCRAPED
            | REDIS
            | RAY
            | names("lookup", "worker", "gateway", "build", "redis", "redis-form"),
        ),
    ],
)
def test_only_neighbours_may_talk(
    rendered: dict[str, list[Document]], name: str, expected: set[str]
) -> None:
    """Policies of both ends together let exactly these connections through."""
    assert expected == connections(rendered[name])


def test_each_overlay_has_its_kinds(rendered: dict[str, list[Document]]) -> None:
    """`local` needs nothing but Kubernetes; `gpu` builds with Ray, keeps tables in six Redis nodes and scales its workers."""
    kinds = {name: {d["kind"] for d in documents} for name, documents in rendered.items()}
    assert set() == kinds["local"] & {kind for _, kind in manifests.SHAPES}
    assert {"ServiceMonitor", "PrometheusRule"} == kinds["monitored"] - kinds["local"]
    assert (
        "1"
        == find(rendered["monitored"], "ConfigMap", "grafana-dashboard")["metadata"]["labels"][
            "grafana_dashboard"
        ]
    )
    assert {"StatefulSet", "HorizontalPodAutoscaler", "RayJob"} <= kinds["gpu"]
    assert 6 == find(rendered["gpu"], "StatefulSet", "redis")["spec"]["replicas"]
    assert ["redis-form"] == [
        d["metadata"]["name"] for d in rendered["gpu"] if d["kind"] in {"Job", "CronJob"}
    ]
    (worker,) = find(rendered["gpu"], "Deployment", "worker")["spec"]["template"]["spec"][
        "containers"
    ]
    assert 1 == worker["resources"]["limits"]["nvidia.com/gpu"]


def test_storage_comes_first(rendered: dict[str, list[Document]]) -> None:
    """What README.md applies before the loader runs, by its label, is the namespace and every claim."""
    for name, claims in (("local", {"models", "tables"}), ("gpu", {"models"})):
        first = [
            d
            for d in rendered[name]
            if d["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "storage"
        ]
        assert {"tolhouse"} | claims == {d["metadata"]["name"] for d in first}
        assert claims == {
            d["metadata"]["name"] for d in rendered[name] if d["kind"] == "PersistentVolumeClaim"
        }


def test_compose_and_kubernetes_form_a_cluster_alike() -> None:
    """kustomize reads no file from outside its folder, so the script is there twice."""
    assert (K8S.parent / "redis-cluster.sh").read_text() == (
        K8S / "overlays" / "gpu" / "redis-cluster.sh"
    ).read_text()


def test_a_setting_that_changes_rolls_its_pods(
    tmp_path: Path, rendered: dict[str, list[Document]]
) -> None:
    """Another value gives a ConfigMap another name, and with it the templates that refer to it, a RayJob's too."""
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "base" / "kustomization.yaml"
    base.write_text(base.read_text().replace("/models/demo-memory", "/models/demo-flex"))
    changed = render(tmp_path / "overlays" / "gpu")
    for kind, name, same in [
        ("Deployment", "lookup", True),
        ("Deployment", "worker", False),
        ("RayJob", "build", False),
    ]:
        assert same == (find(rendered["gpu"], kind, name) == find(changed, kind, name))


def find(documents: list[Document], kind: str, name: str) -> Document:
    """The document of that kind and name; a ConfigMap's name has a digest behind it."""
    (found,) = [
        d
        for d in documents
        if d["kind"] == kind
        and (
            d["metadata"]["name"] == name
            or (kind == "ConfigMap" and d["metadata"]["name"].rpartition("-")[0] == name)
        )
    ]
    return found


def at(kind: str, name: str, path: str, value: Any) -> Callable[[list[Document]], None]:
    """Sets what is at `path` of a document; None deletes it, a function makes it from what it was."""

    def change(documents: list[Document]) -> None:
        place: Any = find(documents, kind, name)
        *way, last = [int(step) if step.isdigit() else step for step in path.split("|")]
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value(place[last]) if callable(value) else value

    return change


def without(kind: str, name: str) -> Callable[[list[Document]], None]:
    return lambda documents: documents.remove(find(documents, kind, name))


CONTAINER = "spec|template|spec|containers|0"
BAD: list[tuple[Check, str, Callable[[list[Document]], None], str]] = [
    (
        manifests.schemas,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|imagePolicy", "Always"),
        "imagePolicy",
    ),
    (manifests.schemas, "local", at("Deployment", "worker", "spec|replicas", "two"), "not of type"),
    (
        manifests.schemas,
        "local",
        at("PodDisruptionBudget", "worker", "apiVersion", "policy/v1beta1"),
        "policy/v1beta1",
    ),
    (
        manifests.schemas,
        "local",
        at("Service", "worker", "metadata|namespace", "default"),
        "namespace default",
    ),
    (manifests.schemas, "local", lambda documents: documents.append(documents[0]), "2 times"),
    (
        manifests.schemas,
        "gpu",
        at("RayJob", "build", "spec|entrypoint", None),
        "entrypoint is missing",
    ),
    (
        manifests.schemas,
        "gpu",
        at("RayJob", "build", "spec|rayClusterSpec|headGroup", {}),
        "headGroup is unknown",
    ),
    (
        manifests.schemas,
        "gpu",
        at("RayJob", "build", "spec|submitterPodTemplate|spec|containers|0|imag", "x"),
        "imag",
    ),
    (
        manifests.schemas,
        "gpu",
        at("ServiceMonitor", "gateway", "spec|endpoints|0|prt", "http"),
        "prt is unknown",
    ),
    (
        manifests.schemas,
        "gpu",
        at("PrometheusRule", "tolhouse", "spec|groups|0|rules|0|expr", None),
        "expr is missing",
    ),
    (
        manifests.selectors,
        "local",
        at("Deployment", "worker", "spec|selector|matchLabels", {"app": "worker"}),
        "its own pods",
    ),
    (
        manifests.selectors,
        "local",
        at("Service", "worker", "spec|selector", {"app": "worker"}),
        "Service worker selects []",
    ),
    (
        manifests.selectors,
        "local",
        at("PodDisruptionBudget", "worker", "spec|selector|matchLabels", {"app": "worker"}),
        "no PodDisruptionBudget",
    ),
    (
        manifests.selectors,
        "local",
        at("NetworkPolicy", "worker", "spec|podSelector|matchLabels", {"app": "worker"}),
        "selects no pod",
    ),
    (
        manifests.selectors,
        "local",
        at(
            "NetworkPolicy",
            "worker",
            "spec|egress|0|to|0|podSelector|matchLabels",
            {"app": "lookup"},
        ),
        "selects no pod",
    ),
    (
        manifests.selectors,
        "local",
        at(
            "Deployment",
            "worker",
            "spec|template|spec|topologySpreadConstraints|0|labelSelector|matchLabels",
            {"app": "x"},
        ),
        "not its own",
    ),
    (
        manifests.selectors,
        "gpu",
        at("StatefulSet", "redis", "spec|serviceName", "redises"),
        "no Service redises",
    ),
    (
        manifests.selectors,
        "gpu",
        at("ServiceMonitor", "gateway", "spec|selector|matchLabels", {"app": "gateway"}),
        "selects no Service",
    ),
    (
        manifests.selectors,
        "gpu",
        at("ServiceMonitor", "gateway", "spec|endpoints|0|port", "metrics"),
        "no port metrics",
    ),
    (
        manifests.selectors,
        "gpu",
        at("HorizontalPodAutoscaler", "worker", "spec|scaleTargetRef|name", "workers"),
        "target is not there",
    ),
    (
        manifests.selectors,
        "gpu",
        at("HorizontalPodAutoscaler", "worker", "spec|minReplicas", 9),
        "above maxReplicas",
    ),
    (
        manifests.selectors,
        "gpu",
        at("Deployment", "worker", "spec|replicas", 2),
        "set the scale back",
    ),
    (
        manifests.volumes,
        "local",
        at("Deployment", "worker", "spec|template|spec|volumes|0|name", "model"),
        "not defined",
    ),
    (
        manifests.volumes,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|volumeMounts|0", None),
        "not mounted",
    ),
    (manifests.volumes, "local", without("PersistentVolumeClaim", "models"), "no claim models"),
    (manifests.volumes, "local", without("ConfigMap", "lookup"), "no ConfigMap lookup"),
    (
        manifests.volumes,
        "local",
        at("ConfigMap", "lookup", "data|TOLHOUSE_LOOKUP_STORE", "file:///table"),
        "where no volume is mounted",
    ),
    (
        manifests.volumes,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|volumeMounts|0|mountPath", "/tmp"),
        "at one place",
    ),
    (
        manifests.volumes,
        "gpu",
        at("StatefulSet", "redis", "spec|volumeClaimTemplates|0|metadata|name", "disk"),
        "not defined",
    ),
    (
        manifests.volumes,
        "gpu",
        at(
            "ConfigMap",
            "lookup",
            "data|TOLHOUSE_LOOKUP_STORE",
            "redis://tolhouse@redis:6379?password_file=/redis",
        ),
        "where no volume is mounted",
    ),
    (
        manifests.secrets,
        "gpu",
        at(
            "ConfigMap",
            "lookup",
            "data|TOLHOUSE_LOOKUP_STORE",
            "redis://tolhouse@redis:6379?password_file=/secrets/redis/admin",
        ),
        "no file of a Secret",
    ),
    (
        manifests.secrets,
        "gpu",
        at("ConfigMap", "gateway", "data|TOLHOUSE_GATEWAY_KEYS_FILE", "/secrets/gateway/keys"),
        "no file of a Secret",
    ),
    (
        manifests.secrets,
        "gpu",
        at("StatefulSet", "redis", f"{CONTAINER}|env|0|valueFrom|secretKeyRef|key", "root"),
        "how to make root of the Secret redis-auth",
    ),
    (
        manifests.secrets,
        "gpu",
        at("ServiceMonitor", "gateway", "spec|endpoints|0|authorization|credentials|name", "keys"),
        "how to make key of the Secret keys",
    ),
    (
        manifests.secrets,
        "gpu",
        at("Deployment", "worker", "spec|template|spec|volumes|3|secret|items", None),
        "how to make * of the Secret services-token",
    ),
    (
        manifests.secrets,
        "gpu",
        at("Deployment", "worker", "spec|template|spec|volumes|3|secret|defaultMode", 0o444),
        "not for its group alone",
    ),
    (
        manifests.secrets,
        "gpu",
        at("Deployment", "worker", "spec|template|spec|securityContext|fsGroup", None),
        "not for its group alone",
    ),
    (
        manifests.secrets,
        "gpu",
        at("Deployment", "worker", f"{CONTAINER}|volumeMounts|3|readOnly", False),
        "mounted for writing",
    ),
    (
        manifests.resources,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|resources|limits|memory", "512Mi"),
        "more memory than its limit",
    ),
    (
        manifests.resources,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|resources|requests|cpu", "250 m"),
        "no quantity",
    ),
    (
        manifests.resources,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|resources|limits|cpu", None),
        "no limit of cpu",
    ),
    (
        manifests.resources,
        "gpu",
        at("ConfigMap", "lookup", "data|TOLHOUSE_LOOKUP_HOT_MEGABYTES", "8192"),
        "hot rows of two versions",
    ),
    (
        manifests.resources,
        "gpu",
        at("Deployment", "worker", f"{CONTAINER}|resources|requests|nvidia.com/gpu", 0),
        "the same in requests",
    ),
    (
        manifests.ports,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|readinessProbe|grpc|port", 50051),
        "asks port 50051",
    ),
    (
        manifests.ports,
        "local",
        at("Deployment", "gateway", f"{CONTAINER}|livenessProbe|httpGet|port", "https"),
        "asks port https",
    ),
    (
        manifests.ports,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|ports|0|name", "rpc"),
        "has no port grpc",
    ),
    (
        manifests.ports,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_LISTEN", "0.0.0.0:50053"),
        "no port of worker",
    ),
    (
        manifests.ports,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_LISTEN", "127.0.0.1:50052"),
        "closed to others",
    ),
    (
        manifests.ports,
        "local",
        at("NetworkPolicy", "worker", "spec|egress|0|ports|0|port", "http"),
        "nobody it means has port http",
    ),
    (
        manifests.environment,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_LOKUP", "x"),
        "TOLHOUSE_WORKER_LOKUP is not",
    ),
    (
        manifests.environment,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_DRAIN_SECONDS", "soon"),
        "drain_seconds",
    ),
    (
        manifests.environment,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_LOOKUP", "dns:///lookups:50051"),
        "no such Service",
    ),
    (
        manifests.environment,
        "local",
        at("ConfigMap", "worker", "data|TOLHOUSE_WORKER_LOOKUP", "dns:///lookup:50052"),
        "no such Service",
    ),
    (
        manifests.environment,
        "local",
        at("Service", "lookup", "spec|clusterIP", None),
        "must be headless",
    ),
    (
        manifests.environment,
        "gpu",
        at("ConfigMap", "lookup", "data|TOLHOUSE_LOOKUP_STORE", "redis://tolhouse@cache:6379"),
        "no such Service",
    ),
    (
        manifests.environment,
        "local",
        at("Deployment", "worker", "spec|template|spec|enableServiceLinks", True),
        "enableServiceLinks",
    ),
    (
        manifests.accounts,
        "local",
        at("Deployment", "worker", "spec|template|spec|serviceAccountName", "default"),
        "account default",
    ),
    (
        manifests.accounts,
        "local",
        at("Deployment", "worker", "spec|template|spec|automountServiceAccountToken", True),
        "mounts a token",
    ),
    (
        manifests.accounts,
        "local",
        at("ServiceAccount", "worker", "automountServiceAccountToken", None),
        "gives a token",
    ),
    (
        manifests.security,
        "local",
        at(
            "Namespace",
            "tolhouse",
            "metadata|labels|pod-security.kubernetes.io/enforce",
            "baseline",
        ),
        "not enforce",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", "spec|template|spec|securityContext|runAsNonRoot", None),
        "run as root",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", "spec|template|spec|securityContext|seccompProfile", None),
        "seccomp",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", "spec|template|spec|hostNetwork", True),
        "shares namespaces",
    ),
    (
        manifests.security,
        "local",
        at(
            "Deployment",
            "worker",
            "spec|template|spec|volumes|0",
            {"name": "models", "hostPath": {"path": "/"}},
        ),
        "not allowed",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|securityContext|allowPrivilegeEscalation", None),
        "gain privileges",
    ),
    (
        manifests.security,
        "local",
        at(
            "Deployment",
            "worker",
            f"{CONTAINER}|securityContext|capabilities",
            {"drop": ["ALL"], "add": ["NET_ADMIN"]},
        ),
        "keeps capabilities",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|securityContext|readOnlyRootFilesystem", False),
        "write to its image",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|ports|0|hostPort", 50052),
        "port of its node",
    ),
    (
        manifests.security,
        "local",
        at("Deployment", "worker", "spec|template|spec|volumes|1|emptyDir", {}),
        "fill its node",
    ),
    (
        manifests.images,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|image", "tolhouse-worker:latest"),
        "no version",
    ),
    (
        manifests.images,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|image", "tolhouse-worker:0.0.9"),
        "not of version",
    ),
    (
        manifests.images,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|image", "tolhouse-wrkr:0.1.0"),
        "no target",
    ),
    (
        manifests.rollout,
        "local",
        at("Deployment", "worker", "spec|strategy|rollingUpdate|maxUnavailable", 1),
        "with a gap",
    ),
    (
        manifests.rollout,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|readinessProbe", None),
        "no readinessProbe",
    ),
    (
        manifests.rollout,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|lifecycle", None),
        "how it pauses",
    ),
    (
        manifests.rollout,
        "local",
        at("Deployment", "worker", "spec|template|spec|terminationGracePeriodSeconds", 130),
        "before it has drained",
    ),
    (
        manifests.rollout,
        "local",
        at("Deployment", "worker", f"{CONTAINER}|startupProbe|failureThreshold", 6),
        "30 s to start",
    ),
    (
        manifests.rollout,
        "gpu",
        at("Deployment", "lookup", f"{CONTAINER}|startupProbe|failureThreshold", 60),
        "may wait 600 s",
    ),
]


@pytest.mark.parametrize(
    ("check", "name", "spoil", "said"),
    BAD,
    ids=[f"{check.__name__}: {said}" for check, _, _, said in BAD],
)
def test_checks_find_what_is_wrong(
    rendered: dict[str, list[Document]],
    check: Check,
    name: str,
    spoil: Callable[[list[Document]], None],
    said: str,
) -> None:
    """Manifests with one thing wrong fail the check that is there for it, and it says so."""
    documents = copy.deepcopy(rendered[name])
    spoil(documents)
    assert said in "\n".join(check(documents))


@pytest.mark.parametrize(
    "policy",
    [
        "default-deny",
        "dns",
        "worker",
        "lookup",
        "gateway",
        "redis",
        "to-redis",
        "build",
        "prometheus",
    ],
)
def test_every_policy_counts(rendered: dict[str, list[Document]], policy: str) -> None:
    """Without any one of the NetworkPolicies, other connections would be let through."""
    documents = copy.deepcopy(rendered["gpu"])
    documents.remove(find(documents, "NetworkPolicy", policy))
    assert connections(rendered["gpu"]) != connections(documents)
