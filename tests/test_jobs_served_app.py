from typing import Any

import pytest
from ray import serve

from jobs import served_app


class Handle:
    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> None:
                self.asked.append((name, args))

        return Method


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    found = Handle()
    monkeypatch.setattr(serve, "get_app_handle", {"mine": found}.__getitem__)
    return found


def test_an_application_with_several_pairs_is_asked_for_one(handle: Handle) -> None:
    asked = served_app.handle("mine:lora")
    request = {"prompt": "a"}
    asked.generate.remote(request)
    asked.describe.remote()
    assert handle.asked == [
        ("generate", ({"prompt": "a", "pair": "lora"},)),
        ("describe", ("lora",)),
    ]
    assert request == {"prompt": "a"}
    assert served_app.model_deployment("mine:lora") == "LDAReplica-lora"


def test_an_application_with_one_pair_is_asked_as_it_is(handle: Handle) -> None:
    assert served_app.handle("mine") is handle
    assert served_app.model_deployment("mine") == "LDAReplica"
