"""Alerts and dashboard are valid for Prometheus' own tools and use metrics that running services
export."""

import json
import re
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import yaml
from tolhouse.store.base import open_store
from tolhouse.testing import build_table, local_cluster

FOLDER = Path("deploy/monitoring")
COMPONENT = Path("deploy/k8s/components/monitoring")
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/tolhouse.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DEMO = Path("models/demo-memory")
promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian's package prometheus) is not installed"
)


def expressions() -> list[str]:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [
        rule["expr"] for rule in ALERTS
    ]


def run(*arguments: str, stdin: str = "") -> str:
    ended = subprocess.run(
        ["promtool", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
        encoding="utf-8",
    )
    assert 0 == ended.returncode, ended.stdout + ended.stderr
    return ended.stdout


@promtool
def test_the_configuration_and_the_alerts_are_correct() -> None:
    """promtool accepts the configuration, and each alert fires when it should and not in normal
    operation."""
    run("check", "config", "--syntax-only", str(FOLDER / "prometheus.yml"))
    run("check", "rules", str(FOLDER / "alerts.yml"))
    run("test", "rules", str(FOLDER / "alerts_test.yml"))


@promtool
def test_every_panel_s_expressions_are_valid(tmp_path: Path) -> None:
    """All expressions of the dashboard are valid."""
    rules = [
        {"record": f"panel:{n}", "expr": expr.replace("$__rate_interval", "1m")}
        for n, expr in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8"
    )
    run("check", "rules", "--lint=none", str(tmp_path / "rules.yml"))


def test_each_alert_has_a_test_and_a_runbook() -> None:
    """Every alert has a test in both directions, a severity and a runbook."""
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    names = {rule["alert"] for rule in ALERTS}
    assert names == {test["alertname"] for test in tests[0]["alert_rule_test"]}
    fired = tests[1]["promql_expr_test"][0]["exp_samples"]
    assert names == {re.search('"(.*)"', sample["labels"]).group(1) for sample in fired}
    assert all(
        {"summary", "runbook"} == set(rule["annotations"]) and rule["labels"]["severity"]
        for rule in ALERTS
    )


def test_kubernetes_has_the_same_alerts_and_the_same_dashboard() -> None:
    """The Kubernetes component has copies of the tested alerts and dashboard, because kustomize
    reads no files outside its folder."""
    manifest = yaml.safe_load((COMPONENT / "alerts.yaml").read_text(encoding="utf-8"))
    assert ALERTS == manifest["spec"]["groups"][0]["rules"]
    assert (FOLDER / "grafana/dashboards/tolhouse.json").read_text(encoding="utf-8") == (
        COMPONENT / "tolhouse.json"
    ).read_text(encoding="utf-8")


def test_the_dashboard_s_panels_do_not_overlap() -> None:
    """Panels have distinct ids and places, and descriptions, and use the data source that the
    viewer selects, by default the provisioned one."""
    panels = DASHBOARD["panels"]
    assert (
        len(panels)
        == len({panel["id"] for panel in panels})
        == len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels})
    )
    (source,) = DASHBOARD["templating"]["list"]
    (provisioned,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    )["datasources"]
    assert (source["query"], source["current"]["value"], True) == (
        provisioned["type"],
        "default",
        provisioned["isDefault"],
    )
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"]
            assert {"type": source["query"], "uid": f"${{{source['name']}}}"} == panel["datasource"]


def test_every_monitored_metric_is_exported(tmp_path: Path) -> None:
    """After valid and invalid requests, services export all metrics of alerts and dashboard, and
    promtool accepts them."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    with closing(open_store(url)), local_cluster(DEMO, url) as cluster:
        for body in (
            {"prompt": "import ", "max_tokens": 4},
            {"prompt": "import ", "max_tokens": 0},
        ):
            httpx.post(f"{cluster.url}/completions", json=body, timeout=60)
        addresses = [
            cluster.gateway,
            *(p.ready["metrics"] for p in cluster.processes if "metrics" in p.ready),
        ]
        texts = [httpx.get(f"http://{address}/metrics").text for address in addresses]
    exported = set(
        re.findall(r"^(?:# TYPE )?([a-z_]+)(?:\{| )", "\n".join(texts), re.MULTILINE)
    ) | {"up"}
    asked = {
        name
        for expr in expressions()
        for name in re.findall(r"\b(?:(?:tolhouse|process)_[a-z_]+|up)\b", expr)
    }
    assert set() == asked - exported
    if shutil.which("promtool"):
        for text in texts:
            run("check", "metrics", stdin=text)
