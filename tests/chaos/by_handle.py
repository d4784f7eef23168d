"""`by_handle.py BODIES ANSWERS IN_FLIGHT`: asked from inside the cluster, in a process of its own.

Says "connected", waits for a line, asks all of the JSON file BODIES and writes ANSWERS.
"""

import asyncio
import json
import sys
from pathlib import Path

from jobs.client_handle import HandleTransport, connected

from .asked import answers


def main(asked: Path, to: Path, in_flight: int) -> None:
    bodies = json.loads(asked.read_text())

    async def ask() -> None:
        transport = HandleTransport(connected("lda"), in_flight, timeout_s=120)
        print("connected", flush=True)
        sys.stdin.readline()
        to.write_text(json.dumps(await answers(transport, bodies, in_flight)))
        await transport.aclose()

    asyncio.run(ask())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
