"""Which state of the project this is, for manifests."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The checkout's commit, `-dirty` if files differ; None for a copy or an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # perhaps a copy within some other repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
