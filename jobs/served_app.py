"""The application that a job calls: `--app NAME`, or `--app NAME:PAIR` where it has several pairs.

The name travels as it is, so a night's plan and `--control-app` can name a pair, too.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ray import serve

from deployments.model_names import replica_deployment


def application(app: str) -> str:
    return app.partition(":")[0]


def pair(app: str) -> str | None:
    return app.partition(":")[2] or None


def model_deployment(app: str) -> str:
    return replica_deployment(pair(app))


def handle(app: str) -> Any:
    """Raises RayServeException where there is no such application."""
    found, named = serve.get_app_handle(application(app)), pair(app)
    return found if named is None else PairHandle(found, named)


class PairHandle:
    """A handle whose requests say which pair they are for."""

    def __init__(self, handle: Any, pair: str) -> None:
        self._handle, self._pair = handle, pair

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._handle, name)

        def remote(request: Mapping[str, Any] | None = None) -> Any:
            if request is None:  # describe
                return method.remote(self._pair)
            return method.remote({**request, "pair": self._pair})

        return SimpleNamespace(remote=remote)
