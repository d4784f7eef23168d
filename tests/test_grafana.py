"""The dashboard shows what the service counts, all of it, and nothing else."""

import json
import re
from typing import Any

from conftest import ROOT

from deployments import ingress_metrics, metrics, metrics_routes

DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana" / "lda.json").read_text())
# Not of the moment.
UNSHOWN = {"lda_kv_tokens", "lda_copy_bytes_per_s", "lda_floor_bytes_total", "lda_noise_floor"}


def exported() -> set[str]:
    """Names at /metrics: Ray adds _total to counters' and a histogram's parts to its name."""
    counters = {f"{metrics._NAMES.get(name, f'lda_{name}')}_total" for name in metrics._TOTALS}
    counters |= {f"{name}_total" for name in ingress_metrics.COUNTERS}
    serve = {f"serve_{name}" for name in metrics_routes._SERVE}
    serve.add("serve_deployment_processing_latency_ms_bucket")
    return counters | set(metrics._NOW) | serve | {"lda_metrics_nodes", "lda_noise_floor"}


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [v["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return panels + variables


def test_every_metric_that_is_asked_for_is_exported_and_what_we_count_is_shown() -> None:
    asked = {name for query in queries() for name in re.findall(r"\b(?:lda|serve)_\w+", query)}
    assert asked <= exported()
    assert {name for name in exported() if name.startswith("lda_")} - asked == UNSHOWN


def test_it_is_a_dashboard_that_grafana_imports() -> None:
    assert DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat") and panel["title"]
        assert set(panel["gridPos"]) == {"h", "w", "x", "y"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
        assert panel["targets"] and all(target["expr"] for target in panel["targets"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for one in (panel, *panel["targets"]):  # whatever Prometheus there is, chosen on top
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len(places) == len(panels)
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "deployment"]
