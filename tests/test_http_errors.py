"""Every kind of failure over HTTP: status, shape, and nothing of what was sent."""

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deployments.http_errors import install_error_handlers
from deployments.plain_api import LDARequest
from deployments.resend import QueueFull
from deployments.schemas import InvalidRequest, NotReady, Overdue, ReplicaUnavailable

SECRET = "SECRET-VALUE"
RAISES: dict[str, Exception] = {
    "invalid": InvalidRequest("alpha", "must be between 0 and 1"),
    "busy": QueueFull(num_queued_requests=1, max_queued_requests=1),
    "overdue": Overdue(SECRET),
    "not ready": NotReady("it is starting", "starting"),
    "gone": ReplicaUnavailable(SECRET),
    "late": TimeoutError(SECRET),
}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/raise/{kind}")
    def fail(kind: str) -> None:
        raise RAISES[kind]

    @app.post("/body")
    def body(body: LDARequest) -> dict[str, Any]:
        return {}

    return TestClient(app)


@pytest.mark.parametrize(
    ("kind", "status", "code", "retry"),
    [
        ("invalid", 400, "invalid_value", "false"),
        ("busy", 429, "queue_full", "true"),
        ("overdue", 503, "overdue", "true"),
        ("not ready", 503, "starting", "true"),
        ("gone", 503, "unavailable", "true"),
        ("late", 503, "unavailable", "true"),
    ],
)
def test_status_code_and_retry(
    client: TestClient, kind: str, status: int, code: str, retry: str
) -> None:
    answer = client.get(f"/raise/{kind}")
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-should-retry"] == retry
    assert ("retry-after" in answer.headers) == (retry == "true")
    assert SECRET not in answer.text


def test_a_bad_body_names_its_field(client: TestClient) -> None:
    answer = client.post("/body", json={"prompt": SECRET, "temprature": 1})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "temprature: unknown field; did you mean temperature?",
        "type": "invalid_request_error",
        "param": "temprature",
        "code": "unknown_field",
    }
