"""check_notebook.py FOLDER: every cell gave what it should, and its rows, drawn in this process."""

import json
import sys
from pathlib import Path

from in_process import lda_core, load, same

out = Path(sys.argv[1])
cells = json.loads((out / "notebook.ipynb").read_text())["cells"]
outputs = [cell["outputs"] for cell in cells if "outputs" in cell]
kinds = [[kind for one in found for kind in one.get("data", {})] for found in outputs]
for kind in ("image/png", "text/html"):
    same(f"there is {kind}", any(kind in found for found in kinds), True)
html = [str(one["data"].get("text/html")) for found in outputs for one in found if "data" in one]
same("tokens are coloured", "<span title=" in "".join(html), True)

engine = load()
ids = lda_core.encode(engine.pair.tokenizer, "What is the capital of France?", "alpaca").ids
rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
wanted = [(alpha, 7 + i) for alpha in (0, 2) for i in range(4)]
same("rows", [(row["alpha"], row["seed"]) for row in rows], wanted)
for row in rows:
    request = lda_core.Request(ids, alpha=row["alpha"], seed=row["seed"], max_new_tokens=32)
    (drawn,) = engine.generate([request])
    same(f"alpha {row['alpha']} seed {row['seed']}", row["completion"], drawn.text)
rates = json.loads((out / "rates.json").read_text())
same("prompts at each alpha", set(rates["count"].values()), {60})
same("more at alpha 3 than at 0", rates["mean"]["3.0"] > rates["mean"]["0.0"], True)
print(f"notebook: {len(rows)} texts equal those drawn in this process; rates {rates['mean']}")
