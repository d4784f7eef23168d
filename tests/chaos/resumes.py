"""Jobs killed while they write and run again: their rows, against those of an uninterrupted run."""

from typing import Any


def run(resumes: int, seed: int = 4) -> dict[str, Any]:
    """`resumes` runs, each killed at a random write, and how many ended with the same rows."""
    try:
        from . import kill_at_write
    except ImportError as error:
        raise RuntimeError("chaos/kill_at_write.py is not there: no resume was tried") from error
    return kill_at_write.run(resumes=resumes, seed=seed)
