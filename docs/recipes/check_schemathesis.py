"""check_schemathesis.py FOLDER: enough cases were tried, on every route, and none failed."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1], "schemathesis.json").read_text())
cases, operations = report["test_cases"], report["operations"]
good = (
    report["complete"]
    and not report["errors"]
    and cases["with_failures"] == cases["errored"] == 0
    and cases["generated"] >= 1000
    and operations["tested"] == operations["total"]
)
print(f"schemathesis: {cases['generated']} cases on {operations['tested']} routes, no 5xx: {good}")
sys.exit(not good)
