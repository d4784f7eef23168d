"""What MLflow (MLFLOW_TRACKING_URI) and W&B (offline, in this folder) hold: tracked.json."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import mlflow
from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7  # bytes of LevelDB's log format, in which W&B writes
FULL, LAST = 1, 4  # kinds of parts that end a record


def records(data: bytes) -> Iterator[bytes]:
    at, record = FILE_HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # filled up with zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield record
            record = b""


(run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
artifacts = sorted(file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id))
(file,) = Path("wandb").glob("offline-run-*/*.wandb")
summary = {}
for record in records(file.read_bytes()):
    message = wandb_internal_pb2.Record()
    message.ParseFromString(record)
    for change in [*message.summary.update, *message.history.item]:
        name = change.key or "/".join(change.nested_key)
        summary[name] = json.loads(change.value_json)
found = {
    "mlflow": {**run.data.tags, **run.data.metrics},
    "artifacts": artifacts,
    "wandb": summary,
}
Path("tracked.json").write_text(json.dumps(found))
