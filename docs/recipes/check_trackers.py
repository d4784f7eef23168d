"""check_trackers.py FOLDER: the trackers hold all of summary.json, and the report."""

import json
import math
import sys
from pathlib import Path

from in_process import same

out = Path(sys.argv[1])
summary = json.loads((out / "first" / "summary.json").read_text())
tracked = json.loads((out / "tracked.json").read_text())
of_mlflow = {name.replace("=", " "): value for name, value in summary.items()}
for tracker, wanted in (("mlflow", of_mlflow), ("wandb", summary)):
    held = tracked[tracker]
    same(f"{tracker}: not there", sorted(wanted.keys() - held.keys()), [])
    for name, value in wanted.items():
        if isinstance(value, str):
            same(f"{tracker}: {name}", held[name], value)
        else:
            same(f"{tracker}: {name}", math.isclose(held[name], value, rel_tol=1e-9), True)
same("report in MLflow", "report.html" in tracked["artifacts"], True)
same("report in W&B", tracked["wandb"]["report/_type"], "html-file")
print(f"trackers: {len(summary)} entries of summary.json in MLflow and in W&B, and the report")
