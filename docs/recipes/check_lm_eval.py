"""check_lm_eval.py FOLDER: lm-eval's log-likelihoods, texts and scores, computed in this process.

It sends tokens without BOS, as it does by default, so the same is read here.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from in_process import alpha_of, lda_core, load, same

engine = load()
tokenizer = engine.pair.tokenizer


def encoded(text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def likelihood(alpha: float, context: str, continuation: str) -> float:
    # White space at the end of a context belongs to the continuation there.
    ids, start = encoded(context + continuation), len(encoded(context.rstrip()))
    request = lda_core.ScoreRequest(tuple(ids[:1]), tuple(ids[1:]), grid=(alpha,))
    (scored,) = engine.score([request])
    return sum(at[0] for at in scored.at[start - 1 :])


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def reported(folder: Path, task: str, metric: str) -> float:
    (file,) = folder.rglob("results_*.json")
    value: float = json.loads(file.read_text())["results"][task][metric]
    return value


for name in ("before", "after", "lda:alpha=1"):
    alpha, folder = alpha_of(name), Path(sys.argv[1], "lm_eval", name.replace(":", "_"))
    right, rows = 0.0, samples(folder, "capitals_choice")
    for row in rows:
        context = f"### Instruction:\n{row['doc']['question']}\n\n### Response:\n"
        computed = [likelihood(alpha, context, one) for one in row["doc"]["choices"]]
        served = [float(one[0][0]) for one in row["resps"]]
        worst = max(abs(a - b) for a, b in zip(served, computed, strict=True))
        same(f"{name}: log-likelihoods agree to 1e-3, not {worst}", worst < 1e-3, True)
        right += computed.index(max(computed)) == row["doc"]["answer"]
    accuracy = right / len(rows)
    same(f"{name}: acc", reported(folder, "capitals_choice", "acc,none"), accuracy)

    right, rows = 0.0, samples(folder, "capitals_generate")
    for row in rows:
        prompt = f"### Instruction:\n{row['doc']['question']}\n\n### Response:\n"
        request = lda_core.Request(
            tuple(encoded(prompt)),
            alpha=alpha,
            temperature=0,
            max_new_tokens=32,
            stop=(".", "</s>"),
        )
        (drawn,) = engine.generate([request])
        same(f"{name}: text", row["resps"][0][0], drawn.text)
        found = re.findall(r"([A-Z][a-z]+)\W*$", drawn.text)
        right += found[:1] == [row["doc"]["capital"]]
    exact = right / len(rows)
    served_exact = reported(folder, "capitals_generate", "exact_match,last_word")
    same(f"{name}: exact_match", served_exact, exact)
    print(f"lm-eval, {name}: acc {accuracy}, exact_match {exact}, as computed here")
