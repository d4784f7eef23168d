"""Full garbage collections, made rare in the two processes that every request passes.

A request that waits for its body holds about 280 objects in Serve's proxy and as many in the
ingress. With Python's own thresholds 1,000 of them are gone through four times in each process
while they come, and again while they wait: 0.2 s, several times, in which nobody is answered. Serve
freezes what was there before, so that even a few new objects are the quarter more at which Python
looks at all of them.
"""

import gc

# Python's own, but for the last one, which is 10: every 700,000 new objects instead of 70,000.
# Ordinary requests leave none behind that only a full collection would find (docs/log.md).
THRESHOLDS = (700, 10, 100)


def make_full_collections_rare() -> None:
    """In this process."""
    gc.set_threshold(*THRESHOLDS)
