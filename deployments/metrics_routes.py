"""GET /metrics: what all replicas count, as Prometheus wants it; a part of the ingress.

Where the numbers come from: `metrics.py` counts in each replica, `ingress_metrics.py` in the
ingress, and they tell Ray, as Serve does with its own numbers. Ray's agent on each node has those
of the node's processes, some seconds old, at its metrics port; this route asks the agents of all
living nodes and passes on what is ours (`lda_...`) and Serve's on our replicas' queue, batches and
times (`serve_...`), without Ray's labels: what these alone told apart (each route, each handle) is
added up. `lda_metrics_nodes` says how many nodes answered.
"""

import asyncio
import re
from collections.abc import Iterable

import httpx
import ray
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

_SERVE = (
    *("deployment_queued_queries", "replica_processing_queries", "actual_batch_size"),
    *("num_ongoing_requests_at_replicas", "deployment_replica_healthy"),
    *("deployment_replica_starts_total", "deployment_request_counter_total"),
    "deployment_processing_latency_ms",
)
_LABELS = ("application", "deployment", "replica", "alpha", "le", "function_name", "code")
_TIMEOUT_S = 5.0
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_SAMPLE = re.compile(r"ray_(\w+)(?:\{(.*)\})? (\S+)")

router = APIRouter()


class MetricsRoutes:
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self) -> PlainTextResponse:
        """Rows, tokens, queue, batches, slots, prefix hits, floor fraction: of all replicas."""
        agents = await asyncio.to_thread(_agents)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
            texts = await asyncio.gather(*(_said(client, agent) for agent in agents))
        answered = [text for text in texts if text is not None]
        head = {
            "answered": len(answered),
            "silent": len(texts) - len(answered),
        }
        return PlainTextResponse(
            "# HELP lda_metrics_nodes nodes of the cluster that these numbers are, or are not, of\n"
            "# TYPE lda_metrics_nodes gauge\n"
            + "".join(f'lda_metrics_nodes{{state="{k}"}} {v}\n' for k, v in head.items())
            + exposition(answered),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )


def _agents() -> list[str]:
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


async def _said(client: httpx.AsyncClient, agent: str) -> str | None:
    try:
        return (await client.get(agent)).raise_for_status().text
    except httpx.HTTPError:
        return None


def exposition(texts: Iterable[str]) -> str:
    """Our part of what several agents say, each metric once, with one sample for its labels."""
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, dict[str, float]] = {}
    for text in texts:
        name = None
        for line in text.splitlines():
            if line.startswith(("# HELP ray_", "# TYPE ray_")):
                _, kind, full, rest = (*line.split(" ", 3), "")[:4]
                name = full.removeprefix("ray_")
                if _ours(name):
                    heads.setdefault(name, {})[kind] = rest
            elif name is not None and _ours(name) and (sample := _SAMPLE.fullmatch(line)):
                full, labels, value = sample.groups()
                of_name, plain = samples.setdefault(name, {}), _plain(full, labels)
                of_name[plain] = of_name.get(plain, 0.0) + float(value)
    lines = []
    for name, found in sorted(samples.items()):
        lines += [f"# {kind} {name} {text}" for kind, text in heads.get(name, {}).items()]
        lines += [f"{sample} {value}" for sample, value in found.items()]
    return "".join(f"{line}\n" for line in lines)


def _ours(name: str) -> bool:
    return name.startswith("lda_") or name.removeprefix("serve_") in _SERVE


def _plain(name: str, labels: str | None) -> str:
    kept = [f'{key}="{text}"' for key, text in _LABEL.findall(labels or "") if key in _LABELS]
    return f"{name}{{{','.join(kept)}}}" if kept else name
