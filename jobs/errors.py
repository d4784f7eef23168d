"""Why a run ends early.

JobError
├── Refused   nothing was sent: a bad option, prompts file, folder or service; exit status 2
└── Stopped   the run cannot go on as it is, and can be resumed; exit status 1
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class JobError(Exception):
    """One argument, the message, so that it survives the way back from a remote task."""


class Refused(JobError):
    pass


class Stopped(JobError):
    pass


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside says which file it was: a write to an open one does not know."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # or its message would go
            error.filename = str(path)
        raise


def exit_status(job: Callable[[], int]) -> int:
    """A resumable job's: its own (0 all rows good, 1 a failed row); 1 if the run failed, 2 for bad
    usage or a refused resume, 130 stopped by Ctrl-C or SIGTERM (`ray job stop`)."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return job()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError) as error:
        print(f"error: {error}\nrun again to resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run again to resume", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
