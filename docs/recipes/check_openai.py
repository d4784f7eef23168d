"""check_openai.py FOLDER: what the openai client got, drawn again in this process."""

import json
import sys
from pathlib import Path

from in_process import lda_core, load, same

rows = json.loads(Path(sys.argv[1], "openai.json").read_text())
engine = load()
ids = lda_core.encode(engine.pair.tokenizer, "What is 4 plus 3?", "alpaca").ids
for row in rows:
    request = lda_core.Request(
        ids,
        alpha=row["alpha"],
        seed=row["seed"],
        max_new_tokens=24,
        logprobs=True,
        kl=True,
    )
    (drawn,) = engine.generate([request])
    same(f"alpha {row['alpha']} seed {row['seed']}", row["text"], drawn.text)
    if "token_ids" in row:
        same("tokens", row["token_ids"], drawn.token_ids)
        assert drawn.logprobs is not None
        worst = max(
            abs(a - b) for a, b in zip(row["amplified"], drawn.logprobs.amplified, strict=True)
        )
        same("log-probabilities agree to 1e-4", worst < 1e-4, True)
print(f"openai: {len(rows)} texts equal those drawn in this process")
