"""The application: `serve run serve_config.yaml`, or `serve.run(build_app(AppArgs(...)))`.

No `from __future__ import annotations` here: Serve looks at the builder's annotation, and
would hand over a plain dict.
"""

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from deployments.ingress import Ingress
from deployments.replica import LDAReplica
from deployments.schemas import Limits
from lda_core import EngineConfig, PairConfig


class AppArgs(BaseModel):
    """`args` of the application in a config file. A misspelt key fails the deploy."""

    model_config = ConfigDict(extra="forbid")

    pair: PairConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    limits: Limits = Field(default_factory=Limits)
    traits: str | None = Field(
        None, description="a folder of trait vectors (*.safetensors) that requests may name"
    )
    results: str | None = Field(
        None, description="a folder; the reports of the finished runs in it are shown on the page"
    )
    stuck_after_s: float = Field(
        120.0, gt=0, description="a replica that shows no step for so long is replaced"
    )


# What these numbers must respect is said in serve_config.a40.yaml; a config file overrides them.
_Replica = serve.deployment(
    name="LDAReplica",
    max_ongoing_requests=128,
    max_queued_requests=2048,
    health_check_period_s=5.0,
    health_check_timeout_s=30.0,
    graceful_shutdown_timeout_s=600.0,
)(LDAReplica)
_Ingress = serve.deployment(
    name="Ingress",
    # More than all replicas may hold and queue: their queue is the one that is bounded, and
    # answers 429 when it is full. Before the ingress requests would wait without a limit.
    max_ongoing_requests=8192,
    graceful_shutdown_timeout_s=600.0,
    ray_actor_options={"num_cpus": 0},
)(Ingress)


def build_app(args: AppArgs) -> Application:
    return _Ingress.bind(
        _Replica.bind(args.pair, args.engine, args.stuck_after_s, args.traits, args.limits),
        args.limits,
        args.results,
    )
