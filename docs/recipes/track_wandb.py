"""`python track_wandb.py RUN`: a run into W&B (`wandb login` first, or WANDB_MODE=offline)."""

import json
import sys
from pathlib import Path

import wandb

folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
summary = json.loads((folder / "summary.json").read_text())
with wandb.init(project="lda", name=folder.name, config=manifest) as run:
    run.summary.update(summary)
    run.log({"report": wandb.Html((folder / "report.html").open())})
