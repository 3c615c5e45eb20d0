"""Checks of the Kubernetes manifests as kustomize renders them, by schema and beyond it."""

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import manifests
from tests.k8s.manifests import CHECKS, Check, Document, connections, render

K8S = Path(__file__).parent.parent.parent / "deploy" / "k8s"
Rendered = dict[str, list[Document]]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """Both overlays, the loader on top of `local`, `local` with components, and both with vLLM."""
    found = {name: render(K8S / "overlays" / name) for name in ("local", "gpu")}
    folder = tmp_path_factory.mktemp("k8s")
    shutil.copytree(K8S, folder, dirs_exist_ok=True)
    local, gpu = (folder / "overlays" / name / "kustomization.yaml" for name in ("local", "gpu"))
    text, auth = local.read_text(encoding="utf-8"), "  - ../../components/auth\n"
    for name, components in (("monitored", "monitoring, traces, auth"), ("vllm", "vllm")):
        listed = ", ".join(f"../../components/{one}" for one in components.split(", "))
        local.write_text(f"{text}components: [{listed}]\n", encoding="utf-8")
        found[name] = render(local.parent)
    with_vllm = f"  - ../../components/vllm\n{auth}"
    gpu.write_text(gpu.read_text(encoding="utf-8").replace(auth, with_vllm), encoding="utf-8")
    found["gpu-vllm"] = render(gpu.parent)
    loader = yaml.safe_load((K8S / "loader.yaml").read_text(encoding="utf-8"))
    loader["metadata"]["namespace"] = manifests.NAMESPACE  # as in README.md's command
    found["local"].append(loader)
    return found


@pytest.mark.parametrize("name", ["local", "monitored", "vllm", "gpu", "gpu-vllm"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_manifests_pass_every_check(rendered: Rendered, name: str, check: Check) -> None:
    """No check finds a problem in any overlay."""
    assert [] == list(check(rendered[name]))


SYSTEM = {
    "gateway > worker:grpc",
    "worker > lookup:grpc",
    "worker > lookup:rows",
    "anyone > gateway:http",
    "prometheus > gateway:http",
    "kuberay > gateway:http",
}
SCRAPED = {"prometheus > lookup:metrics", "prometheus > worker:metrics"}
TRACED = {f"{service} > collector:otlp" for service in ("lookup", "worker", "gateway")}
VLLM = {f"{caller} > vllm:http" for caller in ("anyone", "prometheus", "kuberay")}
VLLM |= {"vllm > lookup:grpc", "vllm > lookup:rows"}
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
        ("vllm", SYSTEM | VLLM | names("lookup", "worker", "gateway", "build", "vllm")),
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
def test_network_policies_allow_only_needed_connections(
    rendered: Rendered, name: str, expected: set[str]
) -> None:
    """The NetworkPolicies of both ends together allow exactly these connections."""
    assert expected == connections(rendered[name])


def test_each_overlay_has_its_kinds(rendered: Rendered) -> None:
    """`local` needs only Kubernetes; `gpu` builds with Ray, stores tables in six Redis nodes and
    scales its workers."""
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


def test_storage_can_be_applied_first(rendered: Rendered) -> None:
    """README.md's first command applies, by label, the namespace and all claims."""
    for name, claims in (("local", {"models", "tables"}), ("gpu", {"models-shared"})):
        first = [
            d
            for d in rendered[name]
            if d["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "storage"
        ]
        assert {"tolhouse"} | claims == {d["metadata"]["name"] for d in first}
        assert claims == {
            d["metadata"]["name"] for d in rendered[name] if d["kind"] == "PersistentVolumeClaim"
        }


# fields that are immutable in Kubernetes, by kind; a Job is deleted before it is applied again
FIXED = {
    "PersistentVolumeClaim": ("accessModes", "resources", "storageClassName", "volumeMode"),
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
    "Service": ("clusterIP",),
}


def test_overlays_do_not_differ_in_immutable_fields(rendered: Rendered) -> None:
    """Objects that both overlays share do not differ in immutable fields."""
    local, gpu = (
        {(d["kind"], d["metadata"]["name"]): d.get("spec") for d in rendered[name]}
        for name in ("local", "gpu")
    )
    both = local.keys() & gpu.keys()
    assert {("Deployment", "worker"), ("Service", "lookup")} <= both
    for kind, name in both:
        for field in FIXED.get(kind, ()):
            assert local[kind, name].get(field) == gpu[kind, name].get(field), (kind, name, field)


def test_the_namespace_can_be_changed_in_one_line(rendered: Rendered, tmp_path: Path) -> None:
    """A kustomization with another namespace moves everything in an overlay to that namespace."""
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    for name in ("local", "gpu"):
        folder = tmp_path / "overlays" / f"mine-{name}"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(
            f"namespace: mine\nresources: [../{name}]\n", encoding="utf-8"
        )
        moved = render(folder)
        assert {"mine"} == {d["metadata"].get("namespace", d["metadata"]["name"]) for d in moved}
    loader = yaml.safe_load((K8S / "loader.yaml").read_text(encoding="utf-8"))
    assert "namespace" not in loader["metadata"]


def test_vllm_reads_rows_like_a_worker(rendered: Rendered) -> None:
    """vLLM serves the workers' checkpoint; with GPUs it has one, and the token of the services."""
    pods = {
        name: find(rendered[name], "Deployment", "vllm")["spec"]["template"]["spec"]
        for name in ("vllm", "gpu-vllm")
    }
    local, gpu = (pod["containers"][0] for pod in pods.values())
    assert "$(TOLHOUSE_WORKER_CHECKPOINT)" == local["args"][0] == gpu["args"][0]
    given = manifests.settings(rendered["gpu-vllm"], gpu)
    assert "/models/demo-memory" == given["TOLHOUSE_WORKER_CHECKPOINT"]
    assert "/secrets/services/token" == given["TOLHOUSE_VLLM_TOKEN_FILE"]
    limits = [one["resources"]["limits"].get("nvidia.com/gpu") for one in (local, gpu)]
    assert [None, 1] == limits
    key = "VLLM_USE_V2_MODEL_RUNNER"
    runners = [manifests.settings(rendered["vllm"], local)[key], given[key]]
    assert ["0", "1"] == runners  # the first one would not read rows within CUDA graphs


@pytest.mark.parametrize("name", ["worker", "gateway", "build"])
def test_a_pod_waits_for_its_checkpoint(rendered: Rendered, name: str, tmp_path: Path) -> None:
    """The init container ends once the checkpoint exists, and names the missing path until then."""
    kind = "Job" if name == "build" else "Deployment"
    pod = find(rendered["local"], kind, name)["spec"]["template"]["spec"]
    (first,), (main,) = pod["initContainers"], pod["containers"]
    assert main["image"] == first["image"]
    path = tmp_path / "checkpoint"
    environment = {f"TOLHOUSE_{name.upper()}_CHECKPOINT": str(path)}
    assert environment.keys() <= manifests.settings(rendered["local"], first).keys()
    command = [*first["command"], first["args"][0].replace("sleep 5", "sleep 0.1")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as waiting:
        assert f"waiting for {path}\n" == waiting.stdout.readline()
        path.mkdir()
        assert 0 == waiting.wait(30)


def test_compose_and_kubernetes_use_the_same_cluster_script() -> None:
    """Both copies of the cluster script are identical, because kustomize reads no files outside its
    folder."""
    assert (K8S.parent / "redis-cluster.sh").read_text(encoding="utf-8") == (
        K8S / "overlays" / "gpu" / "redis-cluster.sh"
    ).read_text(encoding="utf-8")


def test_a_changed_setting_rolls_its_pods(tmp_path: Path, rendered: Rendered) -> None:
    """A changed setting renames its ConfigMap and changes every template that refers to it,
    including a RayJob's."""
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "base" / "kustomization.yaml"
    base.write_text(
        base.read_text(encoding="utf-8").replace("/models/demo-memory", "/models/demo-flex"),
        encoding="utf-8",
    )
    changed = render(tmp_path / "overlays" / "gpu")
    for kind, name, same in [
        ("Deployment", "lookup", True),
        ("Deployment", "worker", False),
        ("RayJob", "build", False),
    ]:
        assert same == (find(rendered["gpu"], kind, name) == find(changed, kind, name))


def find(documents: list[Document], kind: str, name: str) -> Document:
    """The document of that kind and name. A ConfigMap's name ends with a digest."""
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


def set_at(document: Document, path: str, value: Any) -> None:
    """Set the value at `path` of a document; None deletes it."""
    place: Any = document
    *way, last = [int(step) if step.isdigit() else step for step in path.split("|")]
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value


# by check and overlay: a document, a path in it, a value (null deletes), and part of the message;
# @P is the pod of a template, @C its first container
FAULTS = """
schemas local:
    Deployment worker  @C|imagePolicy  Always  imagePolicy
    Deployment worker  spec|replicas  two  not of type
    PodDisruptionBudget worker  apiVersion  policy/v1beta1  policy/v1beta1
    Service worker  metadata|namespace  default  namespace default
schemas gpu:
    RayJob build  spec|entrypoint  null  entrypoint is missing
    RayJob build  spec|rayClusterSpec|headGroup  {}  headGroup is unknown
    RayJob build  spec|submitterPodTemplate|spec|containers|0|imag  x  imag
    ServiceMonitor gateway  spec|endpoints|0|prt  http  prt is unknown
    PrometheusRule tolhouse  spec|groups|0|rules|0|expr  null  expr is missing
selectors local:
    Deployment worker  spec|selector|matchLabels  {"app": "worker"}  its own pods
    Service worker  spec|selector  {"app": "worker"}  Service worker selects []
    PodDisruptionBudget worker  spec|selector|matchLabels  {"app": "worker"}  no PodDisruptionBudget
    NetworkPolicy worker  spec|podSelector|matchLabels  {"app": "worker"}  selects no pod
    NetworkPolicy worker  spec|egress|0|to|0|podSelector|matchLabels|app  lookup  selects no pod
    Deployment worker  @P|topologySpreadConstraints|0|labelSelector|matchLabels  {a: x}  not its own
selectors gpu:
    StatefulSet redis  spec|serviceName  redises  no Service redises
    ServiceMonitor gateway  spec|selector|matchLabels  {"app": "gateway"}  selects no Service
    ServiceMonitor gateway  spec|endpoints|0|port  metrics  no port metrics
    HorizontalPodAutoscaler worker  spec|scaleTargetRef|name  workers  target does not exist
    HorizontalPodAutoscaler worker  spec|minReplicas  9  above maxReplicas
    Deployment worker  spec|replicas  2  reset the scale
volumes local:
    Deployment worker  @P|volumes|0|name  model  not defined
    Deployment worker  @C|volumeMounts|1  null  not mounted
    PersistentVolumeClaim models  -  null  no claim models
    ConfigMap lookup  -  null  no ConfigMap lookup
    ConfigMap lookup  data|TOLHOUSE_LOOKUP_STORE  file:///table  no volume
    Deployment worker  @C|volumeMounts|0|mountPath  /tmp  same mount path
volumes gpu:
    StatefulSet redis  spec|volumeClaimTemplates|0|metadata|name  disk  not defined
    ConfigMap lookup  data|TOLHOUSE_LOOKUP_STORE  redis://r:6379?password_file=/redis  no volume
secrets gpu:
    ConfigMap lookup  data|TOLHOUSE_LOOKUP_STORE  redis://r?password_file=/secrets/redis/a  a file
    ConfigMap gateway  data|TOLHOUSE_GATEWAY_KEYS_FILE  /secrets/gateway/keys  file of a Secret
    StatefulSet redis  @C|env|0|valueFrom|secretKeyRef|key  root  root of the Secret redis-auth
    ServiceMonitor gateway  spec|endpoints|0|authorization|credentials|name  keys  the Secret keys
    Deployment worker  @P|volumes|3|secret|items  null  how to create * of the Secret services-token
    Deployment worker  @P|volumes|3|secret|defaultMode  292  readable beyond its group
    Deployment worker  @P|securityContext|fsGroup  null  readable beyond its group
    Deployment worker  @C|volumeMounts|3|readOnly  false  mounted writable
resources local:
    Deployment worker  @C|resources|limits|memory  512Mi  more memory than its limit
    Deployment worker  @C|resources|requests|cpu  250 m  not a quantity
    Deployment worker  @C|resources|limits|cpu  null  no limit of cpu
resources gpu:
    ConfigMap lookup  data|TOLHOUSE_LOOKUP_HOT_MEGABYTES  "8192"  hot rows of two versions
    Deployment worker  @C|resources|requests|nvidia.com/gpu  0  same in requests
ports local:
    Deployment worker  @C|readinessProbe|grpc|port  50051  undefined port 50051
    Deployment gateway  @C|livenessProbe|httpGet|port  https  undefined port https
    Deployment worker  @C|ports|0|name  rpc  has no port grpc
    ConfigMap worker  data|TOLHOUSE_WORKER_LISTEN  0.0.0.0:50053  not a port of worker
    ConfigMap worker  data|TOLHOUSE_WORKER_LISTEN  127.0.0.1:50052  not reachable
    NetworkPolicy worker  spec|egress|0|ports|0|port  http  no selected pod has port http
environment local:
    ConfigMap worker  data|TOLHOUSE_WORKER_LOKUP  x  TOLHOUSE_WORKER_LOKUP is not
    ConfigMap worker  data|TOLHOUSE_WORKER_DRAIN_SECONDS  soon  drain_seconds
    ConfigMap worker  data|TOLHOUSE_WORKER_ROWS  dns:///lookups:50051  no such Service
    ConfigMap worker  data|TOLHOUSE_WORKER_ROWS  dns:///lookup:50052  no such Service
    Service lookup  spec|clusterIP  null  must be headless
    Deployment worker  @P|enableServiceLinks  true  enableServiceLinks
environment gpu:
    ConfigMap lookup  data|TOLHOUSE_LOOKUP_STORE  redis://tolhouse@cache:6379  no such Service
accounts local:
    Deployment worker  @P|serviceAccountName  default  account default
    Deployment worker  @P|automountServiceAccountToken  true  mounts a token
    ServiceAccount worker  automountServiceAccountToken  null  token mounting
security local:
    Namespace tolhouse  metadata|labels|pod-security.kubernetes.io/enforce  baseline  not enforce
    Deployment worker  @P|securityContext|runAsNonRoot  null  run as root
    Deployment worker  @P|securityContext|seccompProfile  null  seccomp
    Deployment worker  @P|hostNetwork  true  shares namespaces
    Deployment worker  @P|volumes|0  {"name": "models", "hostPath": {"path": "/"}}  not allowed
    Deployment worker  @C|securityContext|allowPrivilegeEscalation  null  gain privileges
    Deployment worker  @C|securityContext|capabilities  {drop: [ALL], add: [KILL]}  capabilities
    Deployment worker  @C|securityContext|readOnlyRootFilesystem  false  write to its image
    Deployment worker  @C|ports|0|hostPort  50052  port of its node
    Deployment worker  @P|volumes|1|emptyDir  {}  no size limit
images local:
    Deployment worker  @C|image  tolhouse-worker:latest  no version
    Deployment worker  @C|image  tolhouse-worker:0.0.9  not of version
    Deployment worker  @C|image  tolhouse-wrkr:0.2.0  not a target
rollout local:
    Deployment worker  spec|strategy|rollingUpdate|maxUnavailable  1  too few pods
    Deployment worker  @C|readinessProbe  null  no readinessProbe
    Deployment worker  @C|lifecycle  null  no preStop pause
    Deployment worker  @P|terminationGracePeriodSeconds  130  before it has drained
    Deployment worker  @C|startupProbe|failureThreshold  6  30 s to start
    Deployment worker  spec|progressDeadlineSeconds  null  fails after 600 s
    Deployment gateway  spec|progressDeadlineSeconds  600  fails after 600 s
rollout gpu:
    Deployment lookup  @C|startupProbe|failureThreshold  60  may wait 600 s
    Deployment lookup  spec|progressDeadlineSeconds  null  fails after 600 s
"""


def faults() -> Iterator[Any]:
    """A case of `test_each_check_finds_its_faults` for each line of FAULTS."""
    for line in FAULTS.strip().splitlines():
        if not line.startswith(" "):
            check, overlay = line.rstrip(":").split()
            continue
        document, path, value, message = re.split("  +", line.strip())
        path = path.replace("@C", "@P|containers|0").replace("@P", "spec|template|spec")
        case = (getattr(manifests, check), overlay, *document.split(), path, value, message)
        yield pytest.param(*case, id=f"{check}: {message}")


@pytest.mark.parametrize(
    ("check", "overlay", "kind", "name", "path", "value", "message"), list(faults())
)
def test_each_check_finds_its_faults(
    rendered: Rendered,
    check: Check,
    overlay: str,
    kind: str,
    name: str,
    path: str,
    value: str,
    message: str,
) -> None:
    """A manifest with one fault fails the corresponding check with a message about it."""
    documents = copy.deepcopy(rendered[overlay])
    if path == "-":
        documents.remove(find(documents, kind, name))
    else:
        set_at(find(documents, kind, name), path, yaml.safe_load(value))
    assert message in "\n".join(check(documents))


def test_a_duplicate_document_is_found(rendered: Rendered) -> None:
    """Two documents with the same kind and name are a problem."""
    documents = rendered["local"]
    assert "defined 2 times" in "\n".join(manifests.schemas([*documents, documents[0]]))


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
def test_every_network_policy_is_necessary(rendered: Rendered, policy: str) -> None:
    """Removing any single NetworkPolicy would allow more connections."""
    documents = copy.deepcopy(rendered["gpu"])
    documents.remove(find(documents, "NetworkPolicy", policy))
    assert connections(rendered["gpu"]) != connections(documents)
