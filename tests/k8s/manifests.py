"""Checks of rendered Kubernetes manifests beyond what a schema can express. Each check yields one
line per problem."""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from pydantic import ValidationError
from tolhouse import config

ROOT = Path(__file__).parent.parent.parent
KUBECTL = Path(sys.executable).parent / "kubectl"
VERSIONS = ("1.27", "1.37")  # the oldest Kubernetes version that README.md supports, and the newest
NAMESPACE = "tolhouse"
NAME = "app.kubernetes.io/name"
SLACK = 256 * 10**6  # bytes that a lookup service needs besides its hot rows

# custom resources without a schema in the validator: the fields that we use, with "?" if optional
SHAPES = {
    ("ray.io/v1", "RayJob"): "entrypoint submissionMode shutdownAfterJobFinishes backoffLimit?"
    " ttlSecondsAfterFinished submitterPodTemplate rayClusterSpec",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "selector endpoints",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "groups",
}
_INNER = {
    "rayClusterSpec": "rayVersion headGroupSpec workerGroupSpecs",
    "headGroupSpec": "rayStartParams template",
    "workerGroupSpecs": "groupName replicas minReplicas maxReplicas rayStartParams template",
    "endpoints": "port path? interval? scheme? authorization?",
    "authorization": "type credentials",
    "groups": "name interval? rules",
    "rules": "alert? record? expr for? labels? annotations?",
}
_CLUSTER_WIDE = {"Namespace"}
_VOLUMES = "configMap csi downwardAPI emptyDir ephemeral persistentVolumeClaim projected secret"
_DECIMAL = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9}
_SUFFIXES = {**_DECIMAL, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Document = dict[str, Any]


@dataclass
class Pod:
    """The pods of one template."""

    owner: Document
    labels: dict[str, str]
    spec: Document
    claims: tuple[str, ...] = ()  # a StatefulSet's claim templates, each of which is a volume

    @property
    def name(self) -> str:
        return self.labels.get(NAME, "")

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def port(self, port: int | str) -> int | None:
        """The number of a container's port, given by number or name; None if no container has
        it."""
        for p in (p for c in self.containers for p in c.get("ports", [])):
            if port in (p.get("name"), p["containerPort"]):
                return int(p["containerPort"])
        return None

    def __str__(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"


def render(folder: Path) -> list[Document]:
    """The documents that `kubectl apply -k` would send."""
    command = [KUBECTL, "kustomize", folder]
    made = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert 0 == made.returncode, made.stderr
    assert "" == made.stderr  # kustomize prints no warning either
    return list(yaml.safe_load_all(made.stdout))


def of(documents: list[Document], *kinds: str) -> list[Document]:
    return [d for d in documents if d["kind"] in kinds]


def pods(documents: list[Document]) -> list[Pod]:
    return [Pod(d, *_pod(t), _claims(d)) for d in documents for t in _templates(d)]


def _templates(document: Document) -> list[Document]:
    spec = document.get("spec", {})
    match document["kind"]:
        case "Pod":
            return [document]
        case "Deployment" | "StatefulSet" | "Job":
            return [spec["template"]]
        case "CronJob":
            return [spec["jobTemplate"]["spec"]["template"]]
        case "RayJob":
            cluster = spec["rayClusterSpec"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            return [spec["submitterPodTemplate"], *(g["template"] for g in groups)]
    return []


def _pod(template: Document) -> tuple[dict[str, str], Document]:
    return template["metadata"].get("labels", {}), template["spec"]


def _claims(document: Document) -> tuple[str, ...]:
    claims = document.get("spec", {}).get("volumeClaimTemplates", [])
    return tuple(claim["metadata"]["name"] for claim in claims)


def selects(selector: Document, labels: dict[str, str]) -> bool:
    for e in selector.get("matchExpressions", []):
        value = labels.get(e["key"])
        right = {
            "In": value in e.get("values", []),
            "NotIn": value not in e.get("values", []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not right[e["operator"]]:
            return False
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


def quantity(text: object) -> Decimal:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if not match or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def settings(documents: list[Document], container: Document) -> dict[str, str]:
    """The environment variables that manifests give a container. Values from other sources are
    empty."""
    maps = {d["metadata"]["name"]: d.get("data", {}) for d in of(documents, "ConfigMap")}
    given: dict[str, str] = {}
    for source in container.get("envFrom", []):
        given |= maps.get(source.get("configMapRef", {}).get("name"), {})
    return given | {e["name"]: e.get("value", "") for e in container.get("env", [])}


def schemas(documents: list[Document]) -> Iterator[str]:
    """Manifests match the strict schemas of the oldest and newest Kubernetes; custom resources
    match their shapes, and the pods in them the schemas."""
    for d in documents:
        where = f"{d['kind']} {d['metadata']['name']}"
        shape = SHAPES.get((d["apiVersion"], d["kind"]))
        if shape:
            yield from (f"{where}: {problem}" for problem in _misshapen(d["spec"], shape))
        else:
            yield from _invalid(d, where)
        if (d["kind"] not in _CLUSTER_WIDE) == (d["metadata"].get("namespace") != NAMESPACE):
            yield f"{where} has the namespace {d['metadata'].get('namespace')}"
    for pod in pods(of(documents, "RayJob")):
        yield from _invalid(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"labels": pod.labels},
                "spec": pod.spec,
            },
            f"a pod of {pod}",
        )
    for name, count in Counter(
        (d["apiVersion"], d["kind"], d["metadata"]["name"]) for d in documents
    ).items():
        if count > 1:
            yield f"{name} is defined {count} times"


def _invalid(document: Document, where: str) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except (
            kubernetes_validate.ValidationError,
            kubernetes_validate.SchemaNotFoundError,
        ) as error:
            yield f"{where} in Kubernetes {version}: {error.message}"


def _misshapen(spec: Document, shape: str) -> Iterator[str]:
    known = shape.split()
    yield from (f"{f} is missing" for f in known if not f.endswith("?") and f not in spec)
    for field, value in spec.items():
        if field not in known and f"{field}?" not in known:
            yield f"{field} is unknown"
        for inner in value if isinstance(value, list) else [value]:
            if field in _INNER:
                yield from _misshapen(inner, _INNER[field])


def selectors(documents: list[Document]) -> Iterator[str]:
    """Selectors match the intended objects, and every target exists."""
    every = pods(documents)
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    for d in documents:
        where, spec = f"{d['kind']} {d['metadata']['name']}", d.get("spec", {})
        if d["kind"] in {"Deployment", "StatefulSet"} and not selects(
            spec["selector"], spec["template"]["metadata"]["labels"]
        ):
            yield f"{where} does not select its own pods"
        if d["kind"] == "StatefulSet" and ("Service", spec["serviceName"]) not in by_name:
            yield f"{where}: there is no Service {spec['serviceName']}"
        if d["kind"] == "Service":
            owners = {p.name for p in every if selects({"matchLabels": spec["selector"]}, p.labels)}
            if len(owners) != 1:
                yield f"{where} selects {sorted(owners)}"
        if d["kind"] == "PodDisruptionBudget":
            owners = {p.name for p in every if selects(spec["selector"], p.labels)}
            if len(owners) != 1:
                yield f"{where} selects {sorted(owners)}"
        if d["kind"] == "NetworkPolicy":
            yield from (
                f"{where}: {s} selects no pod"
                for s in _local_selectors(spec)
                if s and not any(selects(s, p.labels) for p in every)
            )
        if d["kind"] == "ServiceMonitor":
            services = [
                s
                for s in of(documents, "Service")
                if selects(spec["selector"], s["metadata"].get("labels", {}))
            ]
            if not services:
                yield f"{where} selects no Service"
            for s in services:
                ports = {p["name"] for p in s["spec"]["ports"]}
                yield from (
                    f"{where}: Service {s['metadata']['name']} has no port {e['port']}"
                    for e in spec["endpoints"]
                    if e["port"] not in ports
                )
        if d["kind"] == "HorizontalPodAutoscaler":
            target = by_name.get((spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]))
            if target is None:
                yield f"{where}: its target does not exist"
            elif "replicas" in target["spec"]:
                yield f"{where}: its target sets replicas: each apply would reset the scale"
            if spec["minReplicas"] > spec["maxReplicas"]:
                yield f"{where}: minReplicas is above maxReplicas"
    for p in every:
        affinity = (
            p.spec.get("affinity", {})
            .get("podAntiAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", [])
        )
        for s in (*p.spec.get("topologySpreadConstraints", []), *affinity):
            if not selects(s["labelSelector"], p.labels):
                yield f"{p} spreads or avoids pods that are not its own"
    budgets = {
        p.name
        for p in every
        for b in of(documents, "PodDisruptionBudget")
        if selects(b["spec"]["selector"], p.labels)
    }
    for p in every:
        if p.owner["kind"] in {"Deployment", "StatefulSet"} and p.name not in budgets:
            yield f"{p} has no PodDisruptionBudget"


def connections(documents: list[Document]) -> set[str]:
    """The allowed connections, as "from > to:port" for each named port of the pods, with `others`
    for all remaining ports.

    They include external peers that policies can select: DNS, Prometheus, a trace collector,
    KubeRay's operator, and anyone.
    """
    (namespace,) = of(documents, "Namespace")
    home = namespace["metadata"]["labels"] | {"kubernetes.io/metadata.name": NAMESPACE}
    ends = [
        _End(
            p.name,
            home,
            p.labels,
            {
                port["name"]: port["containerPort"]
                for c in p.containers
                for port in c.get("ports", [])
            },
        )
        for p in pods(documents)
    ]
    dns = _End(
        "dns", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}, {"dns": 53}
    )
    collector = _End(
        "collector",
        {"kubernetes.io/metadata.name": "observability"},
        {NAME: "opentelemetry-collector"},
        {"otlp": 4317},
    )
    strangers = [
        _End("prometheus", {"kubernetes.io/metadata.name": "monitoring"}, {NAME: "prometheus"}, {}),
        _End("kuberay", {"kubernetes.io/metadata.name": "ray"}, {NAME: "kuberay-operator"}, {}),
        _End("anyone", {"kubernetes.io/metadata.name": "default"}, {NAME: "worker"}, {}),
    ]
    policies = [p["spec"] for p in of(documents, "NetworkPolicy")]

    def allowed(end: _End, peer: _End, target: _End, port: str, way: str, peers: str) -> bool:
        """Whether the policies of `end`, one of the two ends, allow a connection with `peer` to a
        port of `target`."""
        if end in (dns, collector, *strangers):
            return True
        mine = [
            p for p in policies if way in p["policyTypes"] and selects(p["podSelector"], end.labels)
        ]
        rules = [rule for p in mine for rule in p.get(way.lower(), [])]
        return not mine or any(
            (not rule.get(peers) or any(_means(s, peer, home) for s in rule[peers]))
            and (
                not rule.get("ports")
                or any(r["port"] in (port, target.ports.get(port)) for r in rule["ports"])
            )
            for rule in rules
        )

    return {
        f"{source.name} > {target.name}:{port}"
        for source in [*ends, *strangers]
        for target in [*ends, dns, collector]
        for port in [*target.ports, "others"]
        if not (source in strangers and target in (dns, collector))
        and allowed(source, target, target, port, "Egress", "to")
        and allowed(target, source, target, port, "Ingress", "from")
    }


@dataclass
class _End:
    name: str
    namespace: dict[str, str]
    labels: dict[str, str]
    ports: dict[str, int]


def _means(peer: Document, end: _End, home: dict[str, str]) -> bool:
    there = (
        selects(peer["namespaceSelector"], end.namespace)
        if "namespaceSelector" in peer
        else end.namespace == home
    )
    return there and selects(peer.get("podSelector", {}), end.labels)


def _local_selectors(policy: Document) -> Iterator[Document]:
    yield policy["podSelector"]
    for rule in (*policy.get("ingress", []), *policy.get("egress", [])):
        for peer in (*rule.get("from", []), *rule.get("to", [])):
            if "namespaceSelector" not in peer:
                yield peer["podSelector"]


def volumes(documents: list[Document]) -> Iterator[str]:
    """Every mount has a volume and every volume a mount, and all references of volumes and
    environments exist."""
    claims = {d["metadata"]["name"] for d in of(documents, "PersistentVolumeClaim")}
    maps = {d["metadata"]["name"] for d in of(documents, "ConfigMap")}
    for p in pods(documents):
        defined = {v["name"]: v for v in p.spec.get("volumes", [])}
        mounted = {m["name"] for c in p.containers for m in c.get("volumeMounts", [])}
        yield from (
            f"{p}: the volume {name} is mounted, and not defined"
            for name in sorted(mounted - set(defined) - set(p.claims))
        )
        yield from (
            f"{p}: the volume {name} is defined, and not mounted"
            for name in sorted((set(defined) | set(p.claims)) - mounted)
        )
        used_claims = {
            v["persistentVolumeClaim"]["claimName"]
            for v in defined.values()
            if "persistentVolumeClaim" in v
        }
        yield from (f"{p}: there is no claim {name}" for name in sorted(used_claims - claims))
        used_maps = {v["configMap"]["name"] for v in defined.values() if "configMap" in v}
        used_maps |= {s["configMapRef"]["name"] for c in p.containers for s in c.get("envFrom", [])}
        yield from (f"{p}: there is no ConfigMap {name}" for name in sorted(used_maps - maps))
        for c in p.containers:
            places = [m["mountPath"] for m in c.get("volumeMounts", [])]
            if len(places) != len(set(places)):
                yield f"{p}: two volumes have the same mount path"
            for name, value in settings(documents, c).items():
                for path in _paths(value):
                    if not any(path == m or path.startswith(f"{m}/") for m in places):
                        yield f"{p}: {name} is {value}, where no volume is mounted"


def _paths(value: str) -> list[str]:
    """The files and folders that a setting names."""
    return re.findall(r"(?:^|^file://|password_file=)(/[^&]+)", value)


def secrets(documents: list[Document]) -> Iterator[str]:
    """README.md says how to create every key of a Secret that is used; settings name mounted files
    of Secrets, which only the pod's group can read."""
    used = {
        (m["authorization"]["credentials"]["name"], m["authorization"]["credentials"]["key"])
        for d in of(documents, "ServiceMonitor")
        for m in d["spec"]["endpoints"]
        if "authorization" in m
    }
    for p in pods(documents):
        defined = {v["name"]: v["secret"] for v in p.spec.get("volumes", []) if "secret" in v}
        for name, secret in defined.items():
            used |= {
                (secret["secretName"], item["key"]) for item in secret.get("items", [{"key": "*"}])
            }
            if secret.get("defaultMode") != 0o440 or not p.spec.get("securityContext", {}).get(
                "fsGroup"
            ):
                yield f"{p}: files of {name} are readable beyond its group"
        for c in p.containers:
            used |= {
                (e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"])
                for e in c.get("env", [])
                if "secretKeyRef" in e.get("valueFrom", {})
            }
            mounts = [m for m in c.get("volumeMounts", []) if m["name"] in defined]
            files = {
                f"{m['mountPath']}/{item['path']}"
                for m in mounts
                for item in defined[m["name"]].get("items", [])
            }
            for name, value in settings(documents, c).items():
                for path in _paths(value):
                    if (
                        any(path.startswith(f"{m['mountPath']}/") for m in mounts)
                        and path not in files
                    ):
                        yield f"{p}: {name} is {value}, which is not a file of a Secret"
            yield from (
                f"{p}: {m['name']} is mounted writable" for m in mounts if not m.get("readOnly")
            )
    made = re.findall(
        r"create secret generic ([\w-]+)(.*)",
        (ROOT / "deploy" / "k8s" / "README.md").read_text(encoding="utf-8"),
    )
    documented = {
        (name, key) for name, how in made for key in re.findall(r"--from-file=([\w.-]+)", how)
    }
    yield from (
        f"README.md does not say how to create {key} of the Secret {name}"
        for name, key in sorted(used - documented)
    )


def resources(documents: list[Document]) -> Iterator[str]:
    """Every container requests processor and memory within its limits and enough memory for hot
    rows; devices are requested as integers."""
    for p in pods(documents):
        for c in p.containers:
            requests, limits = (
                c.get("resources", {}).get(kind, {}) for kind in ("requests", "limits")
            )
            for name in ("cpu", "memory"):
                if name not in requests or name not in limits:
                    yield f"{p}: container {c['name']} has no request or no limit of {name}"
            for name in {*requests, *limits}:
                try:
                    wanted, most = (
                        quantity(requests.get(name, limits.get(name))),
                        quantity(limits.get(name, requests.get(name))),
                    )
                except ValueError as error:
                    yield f"{p}: container {c['name']}: {name}: {error}"
                    continue
                if wanted > most:
                    yield f"{p}: container {c['name']} requests more {name} than its limit"
                hot = float(settings(documents, c).get("TOLHOUSE_LOOKUP_HOT_MEGABYTES", 256))
                if name == "memory" and p.name == "lookup" and most < 2 * hot * 10**6 + SLACK:
                    yield f"{p}: container {c['name']} has no room for hot rows of two versions"
                if "/" in name and (wanted != most or name not in limits or most != int(most)):
                    yield f"{p}: container {c['name']}: {name} must be whole, the same in requests"


def ports(documents: list[Document]) -> Iterator[str]:
    """Probes, Services and NetworkPolicies use ports that containers have, and processes listen on
    them."""
    every = pods(documents)
    for p in every:
        for c in p.containers:
            mine = Pod(p.owner, p.labels, {"containers": [c]})
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = c.get(kind, {})
                port = probe.get("httpGet", probe.get("grpc", {})).get("port")
                if port is not None and mine.port(port) is None:
                    yield f"{p}: the {kind} of {c['name']} uses an undefined port {port}"
            for name, value in settings(documents, c).items():
                if name.endswith("LISTEN"):
                    host, _, port = value.rpartition(":")
                    if mine.port(int(port)) is None or host in {"127.0.0.1", "localhost"}:
                        yield f"{p}: {name} is {value}: not a port of {c['name']}, or not reachable"
    for s in of(documents, "Service"):
        for port in s["spec"]["ports"]:
            for p in every:
                if (
                    selects({"matchLabels": s["spec"]["selector"]}, p.labels)
                    and p.port(port.get("targetPort", port["port"])) is None
                ):
                    target = port.get("targetPort")
                    yield f"Service {s['metadata']['name']}: {p} has no port {target}"
    for policy in of(documents, "NetworkPolicy"):
        spec = policy["spec"]
        for rule in spec.get("ingress", []):
            targets = [p for p in every if selects(spec["podSelector"], p.labels)]
            yield from _unknown_ports(policy, rule, targets)
        for rule in spec.get("egress", []):
            peers = [
                peer["podSelector"]
                for peer in rule.get("to", [])
                if "namespaceSelector" not in peer
            ]
            if peers:
                yield from _unknown_ports(
                    policy, rule, [p for p in every if any(selects(s, p.labels) for s in peers)]
                )


def _unknown_ports(policy: Document, rule: Document, targets: list[Pod]) -> Iterator[str]:
    for port in rule.get("ports", []):
        if not any(p.port(port["port"]) for p in targets):
            name = policy["metadata"]["name"]
            yield f"NetworkPolicy {name}: no selected pod has port {port['port']}"


def environment(documents: list[Document]) -> Iterator[str]:
    """Every variable is an option of config.py with a valid value, and the services that values
    name exist."""
    services = {s["metadata"]["name"]: s["spec"] for s in of(documents, "Service")}
    for p in pods(documents):
        if p.spec.get("enableServiceLinks") is not False:
            yield f"{p}: enableServiceLinks is not off"
        for c in p.containers:
            given = settings(documents, c)
            unknown = {
                name for name in given if name.startswith(config.PREFIX)
            } - config.variables()
            yield from (f"{p}: {name} is not a variable of config.py" for name in sorted(unknown))
            for kind in config.CONFIGS:
                fields = {
                    f: given[config.variable(kind, f)]
                    for f in kind.model_fields
                    if given.get(config.variable(kind, f))
                }
                if not fields:  # This may be no command of the pod.
                    continue
                try:
                    kind(**fields)
                except ValidationError as error:
                    first = error.errors()[0]
                    yield f"{p}: {kind.__name__}: {first['loc'][0]}: {first['msg']}"
            for name, value in given.items():
                for scheme, host, port in re.findall(
                    r"\b(dns|redis)://+(?:\w+@)?([\w.-]+):(\d+)", value
                ):
                    spec = services.get(host)
                    if spec is None or int(port) not in [s["port"] for s in spec["ports"]]:
                        yield f"{p}: {name} is {value}, and there is no such Service with that port"
                    elif scheme == "dns" and spec.get("clusterIP") != "None":
                        yield f"{p}: {name} is {value}, but that Service must be headless"


def accounts(documents: list[Document]) -> Iterator[str]:
    """Every long-running pod has its own ServiceAccount without a token."""
    known = {a["metadata"]["name"] for a in of(documents, "ServiceAccount")}
    for a in of(documents, "ServiceAccount"):
        if a.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {a['metadata']['name']} does not disable token mounting"
    for p in pods(documents):
        if p.spec.get("automountServiceAccountToken") is not False:
            yield f"{p} mounts a token"
        if p.owner["kind"] != "Pod" and p.spec.get("serviceAccountName") not in known:
            yield f"{p} has the account {p.spec.get('serviceAccountName')}, which does not exist"


def security(documents: list[Document]) -> Iterator[str]:
    """The namespace enforces the restricted standard, every pod satisfies it, and no container can
    write to its image."""
    for n in of(documents, "Namespace"):
        for mode in ("enforce", "audit", "warn"):
            if n["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"the namespace does not {mode} the restricted standard"
    for p in pods(documents):
        pod = p.spec.get("securityContext", {})
        if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
            yield f"{p} may run as root"
        if pod.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            yield f"{p} has no seccomp profile"
        if any(p.spec.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{p} shares namespaces of its node"
        for v in p.spec.get("volumes", []):
            if not set(v) - {"name"} <= set(_VOLUMES.split()):
                yield f"{p}: the volume {v['name']} is of a kind that is not allowed"
            if "emptyDir" in v and "sizeLimit" not in v["emptyDir"]:
                yield f"{p}: the volume {v['name']} has no size limit"
        for c in p.containers:
            own = c.get("securityContext", {})
            if (
                own.get("allowPrivilegeEscalation") is not False
                or own.get("privileged")
                or own.get("runAsNonRoot", True) is not True
                or own.get("runAsUser") == 0
            ):
                yield f"{p}: container {c['name']} may gain privileges"
            if own.get("capabilities", {}).get("drop") != ["ALL"] or set(
                own.get("capabilities", {}).get("add", [])
            ) - {"NET_BIND_SERVICE"}:
                yield f"{p}: container {c['name']} keeps capabilities"
            if own.get("readOnlyRootFilesystem") is not True or "/tmp" not in [
                m["mountPath"] for m in c["volumeMounts"]
            ]:
                yield f"{p}: container {c['name']} can write to its image, or has no /tmp"
            if any(port.get("hostPort") for port in c.get("ports", [])):
                yield f"{p}: container {c['name']} uses a port of its node"


def images(documents: list[Document]) -> Iterator[str]:
    """Tolhouse's images are targets of deploy/Dockerfile with the current version, and other images
    have a version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    targets = set(
        re.findall(
            r"^FROM \S+ AS (\w+)",
            (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    for p in pods(documents):
        for c in p.containers:
            name, _, tag = c["image"].partition(":")
            if not tag or tag == "latest":
                yield f"{p}: the image {c['image']} has no version"
            elif name.startswith("tolhouse-") and (
                tag != version or name.removeprefix("tolhouse-").removesuffix("-gpu") not in targets
            ):
                yield f"{p}: {c['image']} is not a target of Dockerfile or not of version {version}"


def rollout(documents: list[Document]) -> Iterator[str]:
    """A rollout starts a new pod before it stops an old one, and its time limits suffice for
    starting, loading and draining. The gateway's limit covers the slowest service."""
    # by Deployment, the maximum number of seconds until its pods are available
    patient: dict[str, int] = {}
    for p in pods(of(documents, "Deployment", "ConfigMap")):
        strategy = p.owner["spec"].get("strategy", {}).get("rollingUpdate", {})
        if (strategy.get("maxUnavailable"), strategy.get("maxSurge")) != (0, 1):
            yield f"{p} may have too few pods during a rollout"
        for c in p.spec["containers"]:
            given = settings(documents, c)
            yield from (
                f"{p} has no {kind}"
                for kind in ("startupProbe", "readinessProbe", "livenessProbe")
                if kind not in c
            )
            pause = (
                c.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
            )
            drains = [v for n, v in given.items() if n.endswith("_DRAIN_SECONDS")]
            words = c.get("args", [])
            drains += [b for a, b in pairwise(words) if a == "--shutdown-timeout"]  # of vLLM
            drain = max(map(float, drains), default=None)
            if pause[0] != "sleep" or drain is None:
                yield f"{p} has no preStop pause or no drain time"
            elif p.spec["terminationGracePeriodSeconds"] < float(pause[1]) + drain + 5:
                yield f"{p} is killed before it has drained"
            probe = c.get("startupProbe", {})
            patience = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
            waits = max(
                (float(v) for n, v in given.items() if n.endswith("_WAIT_SECONDS")), default=0
            )
            if patience < waits + 60:
                yield f"{p} has {patience} s to start but may wait {waits:g} s"
            patient[p.name] = patience + p.owner["spec"].get("minReadySeconds", 0)
    for p in pods(of(documents, "Deployment")):
        deadline = p.owner["spec"].get("progressDeadlineSeconds", 600)
        longest = max(patient.values()) if p.name == "gateway" else patient[p.name]
        if deadline <= longest:
            yield f"{p} fails after {deadline} s, but may need {longest} s to become ready"


Check = Callable[[list[Document]], Iterator[str]]
CHECKS: tuple[Check, ...] = (
    schemas,
    selectors,
    volumes,
    secrets,
    resources,
    ports,
    environment,
    accounts,
    security,
    images,
    rollout,
)
