"""What the ingress counts, for Prometheus, beside what its replicas do (`metrics.py`)."""

from functools import cache

from ray.serve import metrics

COUNTERS = {
    "lda_edge_refused": "requests refused before a route saw them, by the code of the answer",
    "lda_resent": "times that a request was sent again because the replica that held it died",
    "lda_replicas_died": "requests given up because one replica after another died with them",
}


def count(name: str, **tags: str) -> None:
    """One more of COUNTERS, with the same tags each time."""
    _counter(name, tuple(tags)).inc(tags=tags)


@cache  # made when first counted, in a replica: Serve's tags are then known
def _counter(name: str, tag_keys: tuple[str, ...]) -> metrics.Counter:
    return metrics.Counter(name, description=COUNTERS[name], tag_keys=tag_keys)
