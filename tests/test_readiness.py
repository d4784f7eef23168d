"""What Serve knows of a deployment, in words: the states and messages are Serve's own."""

import pytest
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, ReplicaState

from deployments.readiness import explained

TRACEBACK = """The deployment failed to start 3 times in a row. This may be due to a problem with \
its constructor or initial health check failing. See controller logs for details. Error:
ray::ServeReplica:lda:LDAReplica.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/secret/place/replica.py", line 3, in __init__
    token = "hf_abcdefghijklmnop"
{error}
"""


def status(state: str, message: str = "", **replicas: int) -> DeploymentStatusOverview:
    return DeploymentStatusOverview(
        status=DeploymentStatus(state),
        status_trigger="UNSPECIFIED",
        replica_states={ReplicaState(name): n for name, n in replicas.items()},
        message=message,
    )


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        (status("UPDATING", STARTING=2), "starting", "models are being loaded"),
        (status("UNHEALTHY", RECOVERING=1), "starting", "again"),
        (status("UPDATING"), "no_replica", "GPUs"),
        (
            status("DEPLOY_FAILED", TRACEBACK.format(error="lda_core.errors.SelfTestFailed: NaN")),
            "deploy_failed",
            "SelfTestFailed: NaN",
        ),
        (
            status(
                "UPDATING",
                TRACEBACK.format(error="lda_core.errors.CheckpointError: /a: hf_abcdefghijkl no"),
                STARTING=1,
            ),
            "deploy_failed",
            "CheckpointError: /a: *** no",
        ),
        (
            status(
                "DEPLOY_FAILED",
                TRACEBACK.format(
                    error="lda_core.errors.CheckpointError: /a: hf_abc-def.ghi_jkl "
                    "sk-proj-0123456789 at https://me:pass@hub/x no"
                ),
            ),
            "deploy_failed",
            "/a: *** *** at https://***hub/x no",
        ),
        (
            status("DEPLOY_FAILED", TRACEBACK.format(error="OSError: hf_abcdefghijklmnop /secret")),
            "deploy_failed",
            "OSError; the log of the replica says more",
        ),
        (status("DEPLOY_FAILED", "hf_abcdefghijklmnop"), "deploy_failed", "the log of the replica"),
    ],
)
def test_why_a_pair_does_not_answer(found: DeploymentStatusOverview, code: str, words: str) -> None:
    told = explained(found)
    assert told is not None and told.code == code and words in told.message
    assert "hf_" not in told.message and "/secret" not in told.message
    assert "\n" not in told.message and len(told.message) < 600


def test_where_a_replica_runs_there_is_nothing_to_tell() -> None:
    assert explained(status("HEALTHY", RUNNING=2)) is None
    assert explained(status("UPDATING", "lda_core.errors.X: y", RUNNING=1)) is None
    # More replicas come because those that run are busy; an update that fails leaves them.
    assert explained(status("UPSCALING", RUNNING=1, STARTING=3)) is None
    assert explained(status("DEPLOY_FAILED", "lda_core.errors.X: y", RUNNING=1)) is None
