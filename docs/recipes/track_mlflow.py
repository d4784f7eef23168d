"""`python track_mlflow.py RUN`: a run's folder into MLflow (MLFLOW_TRACKING_URI says where)."""

import json
import sys
from pathlib import Path

import mlflow

folder = Path(sys.argv[1])
summary = json.loads((folder / "summary.json").read_text())
summary = {name.replace("=", " "): value for name, value in summary.items()}  # no = in its names
with mlflow.start_run(run_name=folder.name):
    mlflow.log_metrics({k: v for k, v in summary.items() if not isinstance(v, str)})
    mlflow.set_tags({k: v for k, v in summary.items() if isinstance(v, str)})  # the verdicts
    mlflow.log_artifacts(str(folder))
