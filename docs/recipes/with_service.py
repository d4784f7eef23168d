"""`with_service.py COMMAND...`: runs it while the shipped service is up; LDA_URL says where."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from deployments.local_service import free_port, local_service  # noqa: E402


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        with local_service(ROOT / "serve_config.yaml", port=free_port(), log=log) as service:
            ray = {name: value for name, value in service.env.items() if name.startswith("RAY_")}
            env = {**os.environ, **ray, "LDA_URL": service.url}
            return subprocess.run(sys.argv[1:], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
