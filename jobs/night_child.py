"""A step's process, which does not outlive the night's driver.

    python jobs/night_child.py DRIVER_PID SCRIPT OPTION...

A driver that is killed cannot stop its step. The kernel can (Linux): it sends SIGTERM, and the
job ends as by Ctrl-C. Elsewhere the step goes on to its end, and the next driver waits for it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # outlives execv


def main(driver: str, script: str, *options: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(driver):  # it died before the kernel was told
            sys.exit(130)
    os.execv(sys.executable, [sys.executable, "-u", script, *options])


if __name__ == "__main__":
    main(*sys.argv[1:])
