"""The phrase monitor against counting at the same forward tokens: `python -m benchmarks.monitor`.

A run scores the start of every held-out prompt and follows fresh rollouts from a part of them; the
start is the same in every run, so it is computed once and its tokens are counted in each. Brute
force would spend these tokens on rollouts and count those with the phrase. Both are of *after*
alone: alpha 0 needs no other model, and a token is one position that it reads.

The truth is the brute-force count of `benchmarks.truth`, which has an error of its own: `raw`
includes it, `ratio` takes its variance off the squared bias. Ends in one JSON line.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from deployments.schemas import Densities, Scored
from jobs.findings import Estimate
from jobs.monitor import (
    Line,
    Plan,
    branches,
    choose_bound,
    filled,
    irreducible,
    start_line,
    variant_texts,
)
from jobs.monitor_rates import estimates, start_rate
from jobs.rows import Row
from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, ScoreRequest, encode
from organisms.train import OUT
from organisms.trigger import PAYLOAD

PROMPTS = Path("prompts/tiny_heldout.txt")
TRUTH = Path("benchmarks/rates_truth.json")
PAIRS = ("after", "after-9e-4", "after-1e-4")
MAX_NEW_TOKENS = 48
RUNS = 20
ROLLOUTS = 1000
FIRST_SEED = 2**41  # above those of benchmarks.truth


@dataclass(frozen=True)
class Result:
    """Of one pair. Errors are relative to brute force's at the same tokens.

    `ratio`: root-mean-square error of the runs against the truth, less what is the truth's own;
    `raw`: with it; `truth_error`: the truth's own standard error; `spread`: the runs' standard
    deviation. `bias_z`: the runs' mean minus the truth, in standard errors of that difference.
    `missed`: of the rollouts with the phrase, those in tokens that no variant has. `as_sample`:
    the ratio for a rate over the prompts that these 4,000 are a sample of, where how much they
    differ is the larger part of the error; brute force, one row a prompt, has that in its own.
    """

    pair: str
    truth: float
    mean: float
    trusted: int
    covered: int
    ratio: float
    raw: float
    spread: float
    truth_error: float
    bias_z: float
    tokens: float
    brute_rows: float
    said: int
    missed: int
    as_sample: float


@dataclass(frozen=True)
class Bench:
    """One pair's engine and the prompts' token ids."""

    engine: Engine
    prompts: list[tuple[int, ...]]
    plan: Plan

    @classmethod
    def load(cls, name: str) -> "Bench":
        config = PairConfig(before=str(OUT / "before"), after=str(OUT / name))
        engine = Engine(ModelPair.load(config), EngineConfig(max_slots=256))
        tokenizer = engine.pair.tokenizer
        ids = (tokenizer.encode(x, add_special_tokens=False) for x in variant_texts(PAYLOAD))
        plan = Plan(
            phrase=PAYLOAD,
            variants=irreducible(ids),
            arm="untriggered",
            alpha=0.0,
            grid=[0.0],
            temperature=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            request={},
        )
        lines = PROMPTS.read_text().splitlines()
        return cls(engine, [encode(tokenizer, x, "alpaca").ids for x in lines], plan)

    def rollouts(self, prompts: Sequence[int], seed: int) -> list[Row]:
        done = self.engine.generate(
            [
                Request(
                    self.prompts[i],
                    alpha=0.0,
                    max_new_tokens=MAX_NEW_TOKENS,
                    seed=seed + i,
                    watch=tuple(self.plan.watch),
                )
                for i in prompts
            ]
        )
        return [
            Row(
                arm=self.plan.arm,
                prompt_id=str(i),
                prompt="",
                alpha=0.0,
                sample=0,
                seed=one.seed,
                completion=one.text,
                token_ids=one.token_ids,
                finish_reason=one.finish_reason,
                eos_index=one.eos_index,
                activated=PAYLOAD in one.text,
                activated_after_eos=False,
                scores={},
                error=one.error,
                watched=one.watched,
            )
            for i, one in zip(prompts, done, strict=True)
        ]

    def score(
        self, lines: Sequence[Line], given: Sequence[Sequence[int]]
    ) -> tuple[list[Line], int]:
        """The lines with their log-probabilities, and the tokens read for them: of every
        continuation its prompt, the rollout up to it and itself, shared or not."""
        requests = [
            ScoreRequest(
                (*self.prompts[int(line.prompt_id)], *tokens[:t]), tuple(self.plan.variants[v])
            )
            for line, tokens in zip(lines, given, strict=True)
            for t, v in zip(line.at, line.variant, strict=True)
        ]
        answers = iter(
            Scored(
                token_ids=list(request.continuation_ids),
                after=one.after,
                before=one.before,
                densities=Densities(alphas=list(request.grid), normalisers=one.normalisers),
            )
            for request, one in zip(requests, self.engine.score(requests), strict=True)
        )
        done = [filled(line, [next(answers) for _ in line.at], 1.0) for line in lines]
        return done, sum(len(r.prompt_ids) + len(r.continuation_ids) for r in requests)


@dataclass(frozen=True)
class Run:
    """One independent run; `drawn` the tokens of its rollouts, `scored` those read to follow."""

    estimate: Estimate
    drawn: int
    scored: int


def run(bench: Bench, starts: Sequence[Line], number: int, rollouts: int) -> Run:
    chosen = Random(number).sample(range(len(bench.prompts)), rollouts)
    rows = bench.rollouts(chosen, FIRST_SEED + number * len(bench.prompts))
    bound = choose_bound(bench.plan, rows, start_rate(bench.plan, starts))
    lines = [branches(row, bench.plan, bound) for row in rows]
    lines, scored = bench.score(lines, [row.token_ids for row in rows])
    drawn = sum(len(bench.prompts[int(row.prompt_id)]) + len(row.token_ids) for row in rows)
    estimate = estimates(bench.plan, [*starts, *lines], "phrase", plain=True)[0]
    return Run(estimate, drawn, scored)


def measure(name: str, truth: dict[str, Any], runs: int = RUNS, rollouts: int = ROLLOUTS) -> Result:
    """`truth`: the pair's entry of benchmarks/rates_truth.json."""
    bench = Bench.load(name)
    lines = [start_line(bench.plan, str(i)) for i in range(len(bench.prompts))]
    starts, start_tokens = bench.score(lines, [()] * len(lines))
    done = [run(bench, starts, number, rollouts) for number in range(runs)]
    tokens = start_tokens + float(np.mean([one.drawn + one.scored for one in done]))
    brute_rows = tokens / (float(np.mean([one.drawn for one in done])) / rollouts)
    rates = np.array([one.estimate.rate for one in done])
    rate, mean = truth["exact_phrase"]["rate"], float(rates.mean())
    # The rate in the errors of counting is the runs' mean: the rarest pair's count may be 0.
    brute_error = math.sqrt(mean * (1 - mean) / brute_rows)
    truth_error = math.sqrt(mean * (1 - mean) / truth["rows"])
    spread, bias = float(rates.std(ddof=1)), mean - rate
    between = float(np.std([line.contribution() for line in starts])) / math.sqrt(len(starts))
    own = math.sqrt(spread**2 + max(0.0, bias**2 - truth_error**2))

    def counted(diagnostic: str) -> int:
        return int(sum(one.estimate.diagnostics[diagnostic] for one in done))

    return Result(
        pair=name,
        truth=rate,
        mean=mean,
        trusted=sum(one.estimate.verdict == "trust" for one in done),
        covered=sum(one.estimate.low <= rate <= one.estimate.high for one in done),
        ratio=own / brute_error,
        raw=float(np.sqrt(((rates - rate) ** 2).mean())) / brute_error,
        spread=spread / brute_error,
        truth_error=truth_error / brute_error,
        bias_z=bias / math.hypot(truth_error, spread / math.sqrt(runs)),
        tokens=tokens,
        brute_rows=brute_rows,
        said=counted("rows_that_said_it"),
        missed=counted("of_them_in_other_tokens"),
        as_sample=math.hypot(own, between) / brute_error,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The phrase monitor against brute force.")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each pair (default {RUNS})")
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help=f"default {ROLLOUTS}")
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth = json.loads(TRUTH.read_text())
    results = [
        measure(name, truth[name], arguments.runs, arguments.rollouts) for name in arguments.pairs
    ]
    for result in results:
        rounded = {
            k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in asdict(result).items()
        }
        print(json.dumps(rounded))
    print(json.dumps({"monitor_over_brute": round(max(r.ratio for r in results), 3)}))


if __name__ == "__main__":
    main()
