"""Why a run ends early.

JobError
├── Refused   nothing was sent: a bad option, prompts file, folder or service; exit status 2
└── Stopped   the run cannot go on as it is, and can be resumed; exit status 1
"""


class JobError(Exception):
    """One argument, the message, so that it survives the way back from a remote task."""


class Refused(JobError):
    pass


class Stopped(JobError):
    pass
