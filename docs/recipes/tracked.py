"""What MLflow (MLFLOW_TRACKING_URI) and W&B (offline, in this folder) hold: tracked.json."""

import json
from pathlib import Path

import mlflow
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal import datastore

(run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
artifacts = sorted(file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id))
(file,) = Path("wandb").glob("offline-run-*/*.wandb")
store = datastore.DataStore()
store.open_for_scan(str(file))
summary = {}
while (record := store.scan_data()) is not None:
    message = wandb_internal_pb2.Record()
    message.ParseFromString(record)
    for change in message.summary.update:
        name = change.key or "/".join(change.nested_key)
        summary[name] = json.loads(change.value_json)
found = {"mlflow": run.data.metrics, "artifacts": artifacts, "wandb": summary}
Path("tracked.json").write_text(json.dumps(found))
