"""The application: `serve run serve_config.yaml`, or `serve.run(build_app(AppArgs(...)))`.

No `from __future__ import annotations` here: Serve looks at the builder's annotation, and
would hand over a plain dict.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from ray import serve
from ray.serve import Application

from deployments.edge_options import EdgeOptions
from deployments.ingress import Ingress
from deployments.model_names import ALONE, DEFAULT, replica_deployment
from deployments.replica import LDAReplica
from deployments.schemas import Limits
from lda_core import EngineConfig, PairConfig

# Part of the names of models, where a colon ends it, and of deployments.
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class OnePair(BaseModel):
    """A pair with the engine that is its alone."""

    model_config = ConfigDict(extra="forbid")

    pair: PairConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    traits: str | None = Field(
        None, description="a folder of trait vectors (*.safetensors) that requests may name"
    )


class AppArgs(BaseModel):
    """`args` of the application in a config file: one pair, which is called `lda`, or several in
    `pairs`, by their names. A misspelt key fails the deploy."""

    model_config = ConfigDict(extra="forbid")

    pair: PairConfig | None = None
    engine: EngineConfig = Field(default_factory=EngineConfig)
    traits: str | None = None
    pairs: Annotated[dict[_Name, OnePair], Field(min_length=1)] | None = None
    limits: Limits = Field(default_factory=Limits)
    edge: EdgeOptions = Field(default_factory=EdgeOptions)
    results: str | None = Field(
        None, description="a folder; the reports of the finished runs in it are shown on the page"
    )
    stuck_after_s: float = Field(
        120.0, gt=0, description="a replica that shows no step for so long is replaced"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.pair is None) == (self.pairs is None):
            raise ValueError("give exactly one of pair and pairs")
        if self.pairs is not None:
            if given := {"engine", "traits"} & self.model_fields_set:
                raise ValueError(f"{' and '.join(sorted(given))}: belongs to each of the pairs")
            if taken := sorted(ALONE & set(self.pairs)):
                raise ValueError(f"pairs: {taken[0]} is the name of one of the models of lda")
        return self

    @property
    def resident(self) -> dict[str, OnePair]:
        """All pairs by their names."""
        if self.pair is None:
            return self.pairs or {}
        return {DEFAULT: OnePair(pair=self.pair, engine=self.engine, traits=self.traits)}


# What these numbers must respect is said in serve_config.a40.yaml; a config file overrides them.
_Replica = serve.deployment(
    name=replica_deployment(None),
    max_ongoing_requests=128,
    max_queued_requests=2048,
    health_check_period_s=5.0,
    health_check_timeout_s=30.0,
)(LDAReplica)
_Ingress = serve.deployment(
    name="Ingress",
    # More than all replicas may hold and queue: their queue is the one that is bounded, and
    # answers 429 when it is full. Before the ingress requests would wait without a limit.
    max_ongoing_requests=8192,
    ray_actor_options={"num_cpus": 0},
)(Ingress)
# Draining lasts so much longer than any request, or it loses some.
_DRAINED_AFTER_S = 60.0


def build_app(args: AppArgs) -> Application:
    """A deployment for each pair: all are resident side by side, and none is ever evicted.

    In a config file's `deployments` they are `LDAReplica`, or of `pairs` `LDAReplica-NAME`.
    """

    drain_s = args.limits.max_request_s + _DRAINED_AFTER_S

    def replicas(name: str, one: OnePair) -> Application:
        deployment = replica_deployment(None if args.pairs is None else name)
        return _Replica.options(name=deployment, graceful_shutdown_timeout_s=drain_s).bind(
            one.pair, one.engine, args.stuck_after_s, one.traits, args.limits
        )

    return _Ingress.options(graceful_shutdown_timeout_s=drain_s).bind(
        {name: replicas(name, one) for name, one in args.resident.items()},
        args.limits,
        args.results,
        args.edge,
    )
