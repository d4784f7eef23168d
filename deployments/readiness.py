"""Why a pair does not answer, in words a person can act on: for `/ready`.

Only our own errors are quoted. What else Serve knows of a failed start is a traceback, which may
show anything: of that the error's name is told, and where to find the rest.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from deployments.schemas import NotReady, ReplicaUnavailable

_OURS = re.compile(r"\blda_core\.errors\.(\w+): ([^\n]+)")
_RAISED = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Failed))\b", re.MULTILINE)
# Tokens, and what an address says before its host.
_SECRET = re.compile(r"\b(?:hf|sk|api)[-_][^\s'\"]{8,}|(?<=://)[^\s/@]+@")
_IN_LOG = "the log of the replica says more"
_MAX_CHARS = 500
_STATUS_TIMEOUT_S = 2.0
# One thread, and its own: a controller that does not answer must not take those of others.
_status_thread = ThreadPoolExecutor(1)


async def why(replica: DeploymentHandle, error: Exception) -> NotReady:
    """What keeps the deployment behind a handle from answering, where asking it gave `error`; with
    the code `busy` where its replicas run, and had no time for the question."""
    if isinstance(error, NotReady):
        return error
    silence = NotReady(f"no answer ({type(error).__name__})", ReplicaUnavailable.code)
    try:
        found = await _status(replica)
    except Exception:  # Serve cannot tell either, whatever its reason
        return silence
    if found is None:
        return silence
    if cause := explained(found):
        return cause
    if isinstance(error, (BackPressureError, TimeoutError)):
        return NotReady("its replicas run, but are too busy to say what they are", "busy")
    return silence


async def _status(replica: DeploymentHandle) -> DeploymentStatusOverview | None:
    """What Serve says of it. Raises TimeoutError, and what Serve raises."""
    if not ray.is_initialized():
        return None
    async with asyncio.timeout(_STATUS_TIMEOUT_S):
        status = await asyncio.get_running_loop().run_in_executor(_status_thread, serve.status)
    app = status.applications.get(replica.app_name)
    return app.deployments.get(replica.deployment_name) if app else None


def explained(status: DeploymentStatusOverview) -> NotReady | None:
    """None where a replica runs: more that start, or fail to, do not keep it from answering."""
    states = status.replica_states
    if states.get("RUNNING"):
        return None
    cause = _cause(status.message)
    if status.status == "DEPLOY_FAILED":
        return NotReady(f"it cannot start: {cause or _IN_LOG}", "deploy_failed")
    if cause is not None:
        return NotReady(f"it does not start: {cause}", "deploy_failed")
    if states.get("STARTING"):
        return NotReady("it is starting: the models are being loaded", "starting")
    if states.get("RECOVERING") or states.get("UPDATING"):
        return NotReady("it is starting again", "starting")
    return NotReady(
        "it has no replica and none starts: are there enough GPUs, CPUs and memory?", "no_replica"
    )


def _cause(message: str) -> str | None:
    """The error in what Serve says of a failed start, without anything that is secret."""
    if ours := _OURS.findall(message):
        name, text = ours[-1]
        return f"{name}: {_SECRET.sub('***', text)}"[:_MAX_CHARS]
    if raised := _RAISED.findall(message):
        return f"{raised[-1]}; {_IN_LOG}"
    return None
