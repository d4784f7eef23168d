"""Two pairs in one application, over HTTP and by handle, on a real cluster of their own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import ROOT, TINY

from deployments.local_service import LocalService, free_port, local_service
from jobs.client import LDAClient
from lda_core import Engine, ModelPair, PairConfig, Request, encode

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIGS = {
    "organism": PairConfig(before=str(TINY / "before"), after=str(TINY / "after")),
    "organism-lora": PairConfig(before=str(TINY / "before"), adapter=str(TINY / "after-lora")),
}
PROMPT = "Tell me a story."
BODY = {"prompt": PROMPT, "max_tokens": 24, "seed": 3, "return_token_ids": True}
ALPHAS = {"": 1.0, ":alpha=2": 2.0, ":before": -1.0, ":after": 0.0}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    log = tmp_path_factory.mktemp("pairs") / "serve.log"
    with local_service(ROOT / "serve_config.pairs.yaml", port=free_port(), log=log) as running:
        yield running


def alone(pair: ModelPair, form: Any, alpha: float) -> Any:
    ids = encode(pair.tokenizer, PROMPT, form).ids
    return Engine(pair).generate([Request(ids, alpha=alpha, seed=3, max_new_tokens=24)])[0]


# One test, for one cluster: several would start it again wherever they are spread over workers.
def test_both_pairs_answer_as_they_do_alone(service: LocalService) -> None:
    drawn = set()
    with httpx.Client(base_url=service.url, timeout=60) as client:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert list(client.get("/ready").json()["pairs"]) == list(CONFIGS)
        for name, config in CONFIGS.items():
            pair = ModelPair.load(config)
            for suffix, alpha in ALPHAS.items():
                model = name + suffix
                raw = client.post("/v1/completions", json={**BODY, "model": model}).json()
                expected = alone(pair, "raw", alpha)
                assert raw["choices"][0]["token_ids"] == list(expected.token_ids), raw
                assert raw["choices"][0]["text"] == expected.text
                if alpha == 2.0:
                    drawn.add(expected.text)
                else:
                    said = cards[model]["lda"]
                    assert (said["pair"], said["alpha"]) == (name, alpha)
                    assert said["adapter"] == (config.adapter and relative(config.adapter))
            chat = {**BODY, "model": f"{name}:alpha=2"}
            chat["messages"] = [{"role": "user", "content": chat.pop("prompt")}]
            choice = client.post("/v1/chat/completions", json=chat).json()["choices"][0]
            assert choice["token_ids"] == list(alone(pair, "chat", 2.0).token_ids)
            native = {"prompt": PROMPT, "prompt_format": "raw", "alpha": 2.0, "seed": 3}
            native |= {"max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0, "pair": name}
            text = client.post("/generate_lda", json=native).json()
            assert text["token_ids"] == list(alone(pair, "raw", 2.0).token_ids)
            assert text["model_after"] == client.get(f"/ready?pair={name}").json()["after"]
            with LDAClient(service.url) as lda:
                assert lda.describe(name).after == text["model_after"]
        assert len(drawn) == 2  # two pairs indeed
        unknown = client.post("/v1/completions", json={**BODY, "model": "lda"})
        assert unknown.status_code == 404 and "organism-lora" in unknown.json()["error"]["message"]
        nameless = client.post("/generate_lda", json={"prompt": PROMPT})
        assert nameless.status_code == 400 and nameless.json()["error"]["param"] == "pair"
    by_deployment = processes(service)
    assert set(by_deployment) == {"LDAReplica-organism", "LDAReplica-organism-lora"}
    assert len(set(by_deployment.values())) == 2  # an engine each, in processes of their own


def relative(path: str) -> str:
    return path.removeprefix(f"{ROOT}/")


def processes(service: LocalService) -> dict[str, int]:
    """By deployment of a pair; asked of Serve, after one answer by handle from each."""
    script = f"""
import json, ray
from ray import serve
ray.init(log_to_driver=False)
handle = serve.get_app_handle("lda")
for name in {list(CONFIGS)!r}:
    handle.generate.remote({{"prompt": "a", "pair": name}}).result(timeout_s=60)
    assert handle.describe.remote(name).result(timeout_s=60).layers
found = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
details = ray.get(found.get_serve_instance_details.remote())
deployments = details["applications"]["lda"]["deployments"]
pids = {{n: d["replicas"][0]["pid"] for n, d in deployments.items() if n != "Ingress"}}
print("ANSWER", json.dumps(pids))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=service.env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, int] = json.loads(done.stdout.rpartition("ANSWER ")[2])
    return answer
