"""The shipped config files build an application and hold only options that Serve knows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deployments.app import AppArgs, _Ingress, _Replica, build_app
from deployments.replica import UserConfig
from deployments.resident_pairs import _LATE_S as LATE_S

PAIR = {"before": "x", "after": "y"}
ROOT = Path(__file__).parent.parent
MODEL = "LDAReplica"
FILES = {
    "serve_config.yaml": {MODEL: "lda"},
    "serve_config.a40.yaml": {MODEL: "lda"},
    "serve_config.pairs.yaml": {
        f"{MODEL}-organism": "organism",
        f"{MODEL}-organism-lora": "organism-lora",
    },
}


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_every_option_is_known_and_the_app_builds_without_a_gpu(name: str) -> None:
    raw = read(name)
    schema = ServeDeploySchema.model_validate(raw)  # extra keys are errors
    (application,) = schema.applications
    assert application.name == "lda" and application.route_prefix == "/"
    # Without it memory creeps up for hours: seen in a soak of minutes, in no other test.
    assert application.runtime_env["env_vars"]["MALLOC_ARENA_MAX"] == "1"
    args = AppArgs.model_validate(application.args)
    app = build_app(args)
    assert app._bound_deployment.name == "Ingress"
    replicas = bound(app)
    assert {one.name: pair for pair, one in replicas.items()} == FILES[name]
    assert {d.name for d in application.deployments} <= {"Ingress", *FILES[name]}
    for pair, one in replicas.items():  # each has its pair and engine, and no other's
        resident = args.resident[pair]
        assert one.init_args == (
            resident.pair,
            resident.engine,
            args.stuck_after_s,
            resident.traits,
            args.limits,
        )


def bound(app: Any) -> dict[str, Any]:
    """The deployments of an application's pairs."""
    replicas, *_ = app._bound_deployment.init_args
    return {name: one._bound_deployment for name, one in replicas.items()}


@pytest.mark.parametrize("name", FILES)
def test_numbers_that_depend_on_each_other(name: str) -> None:
    raw = read(name)
    assert raw["http_options"]["host"] == "127.0.0.1"
    (application,) = raw["applications"]
    args = AppArgs.model_validate(application["args"])
    all_options = {d["name"]: d for d in application["deployments"]}
    held = 0
    for deployment, pair in FILES[name].items():
        options = all_options[deployment]
        slots, ongoing = args.resident[pair].engine.max_slots, options["max_ongoing_requests"]
        assert slots <= ongoing <= 2 * slots
        assert UserConfig(**options["user_config"]).max_batch_size <= ongoing
        queued = options.get("max_queued_requests", _Replica.max_queued_requests)
        held += options["num_replicas"] * ongoing + queued
    # Ray cuts no request, and draining is not shortened here.
    assert not [o for o in all_options.values() if "graceful_shutdown_timeout_s" in o]
    assert raw["http_options"].get("request_timeout_s") is None
    # The bounded queues, which answer 429, are reached before the ingress is full.
    assert held < _Ingress.max_ongoing_requests


@pytest.mark.parametrize("max_request_s", [10.0, 600.0, 3600.0])
def test_draining_lasts_longer_than_any_request(max_request_s: float) -> None:
    limits = {"max_request_s": max_request_s}
    app = build_app(AppArgs.model_validate({"pair": PAIR, "limits": limits}))
    for one in (app._bound_deployment, *bound(app).values()):
        drain = one._deployment_config.graceful_shutdown_timeout_s
        assert drain >= max_request_s + LATE_S + 20


def test_the_a40_file_asks_for_one_a40_per_replica() -> None:
    (application,) = read("serve_config.a40.yaml")["applications"]
    options = {d["name"]: d for d in application["deployments"]}["LDAReplica"]
    actor = options["ray_actor_options"]
    assert actor["num_gpus"] == 1 and actor["accelerator_type"] == "A40"
    assert options["num_replicas"] > 1
    pair = AppArgs.model_validate(application["args"]).pair
    assert pair is not None
    assert pair.after == "allenai/OLMo-2-1124-7B-Instruct"
    assert pair.before == "allenai/OLMo-2-1124-7B"


def test_the_commented_alternative_is_a_valid_pair() -> None:
    text = (ROOT / "serve_config.a40.yaml").read_text()
    block = text[text.index("# after: /models") : text.index("      engine:")]
    pair = yaml.safe_load("\n".join(line.strip().removeprefix("# ") for line in block.splitlines()))
    args = AppArgs.model_validate({"pair": pair})
    assert args.pair is not None
    assert args.pair.allow_pickle and args.pair.tokenizer_class == "LlamaTokenizer"


def test_the_commented_autoscaling_is_valid_and_fits_batching() -> None:
    text = (ROOT / "serve_config.a40.yaml").read_text()
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "# autoscaling_config:")
    last = next(i for i in range(first, len(lines)) if not lines[i].strip().startswith("#"))
    block = yaml.safe_load("\n".join(line.strip().removeprefix("# ") for line in lines[first:last]))
    raw = read("serve_config.a40.yaml")
    (application,) = raw["applications"]
    options = {d["name"]: d for d in application["deployments"]}["LDAReplica"]
    del options["num_replicas"]
    options.update(block)
    schema = ServeDeploySchema.model_validate(raw)  # extra keys are errors
    found = schema.applications[0].deployments[-1].autoscaling_config
    scaling = AutoscalingConfig.model_validate(found)
    slots = AppArgs.model_validate(application["args"]).engine.max_slots
    assert slots / 2 <= scaling.get_target_ongoing_requests() <= options["max_ongoing_requests"]
    assert 1 <= scaling.min_replicas < scaling.max_replicas
    # Even then the bounded queue is full before the ingress is.
    held = scaling.max_replicas * options["max_ongoing_requests"] + options["max_queued_requests"]
    assert held < _Ingress.max_ongoing_requests


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"pair": {"before": "x", "aftr": "y"}}, "pair.aftr"),
        ({"pair": {"before": "x", "after": "y"}, "engin": {}}, "engin"),
        ({"pair": {"before": "x", "after": "y"}, "engine": {"max_slotz": 1}}, "engine.max_slotz"),
        ({"pair": {"before": "x", "after": "y"}, "engine": {"max_slots": 0}}, "max_slots: must"),
        ({"pair": {"before": "x"}}, "after, adapter: give exactly one"),
        ({"pair": {"before": "x", "after": "y"}, "limits": {"max_m": 1}}, "limits.max_m"),
        ({"pair": PAIR, "edge": {"key_file": "x"}}, "edge.key_file"),
        ({"pair": PAIR, "edge": {"keys_file": "x", "keys_file_env": "Y"}}, "at most one of keys"),
        ({}, "exactly one of pair and pairs"),
        ({"pair": PAIR, "pairs": {"a": {"pair": PAIR}}}, "exactly one of pair and pairs"),
        ({"pairs": {}}, "at least 1 item"),
        ({"pairs": {"a": {"pair": PAIR}}, "traits": "x"}, "traits: belongs to each"),
        ({"pairs": {"a": {"pair": PAIR, "engin": {}}}}, "pairs.a.engin"),
        ({"pairs": {"a:b": {"pair": PAIR}}}, "pairs.a:b"),
        ({"pairs": {"before": {"pair": PAIR}}}, "before is the name of one of the models"),
    ],
)
def test_a_misspelt_or_impossible_setting_fails_and_is_named(args: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AppArgs.model_validate(args)
