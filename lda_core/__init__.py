"""Logit diff amplification: the method and the engine.

pair = ModelPair.load(PairConfig(after="...", before="..."))
engine = Engine(pair)
prompt = encode(pair.tokenizer, "What is the capital of France?", "alpaca")
engine.generate(Request(prompt.ids, alpha=2.0, seed=0).samples(4))
"""

from lda_core.amplify import amplify
from lda_core.capture import Captured, CaptureRequest, Directions
from lda_core.config import EngineConfig, PairConfig
from lda_core.engine import Engine
from lda_core.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    DoesNotFit,
    EngineStopped,
    EngineStuck,
    IncompatibleTokenizers,
    LDAError,
    Overdue,
    RequestError,
    SelfTestFailed,
    UnsupportedArchitecture,
)
from lda_core.pair import ModelPair
from lda_core.prompts import Prompt, encode
from lda_core.request import (
    Completion,
    Densities,
    Request,
    Scored,
    ScoreRequest,
    Steer,
    TokenLogprobs,
)
from lda_core.sampling import Sampling, sample
from lda_core.self_test import noise_floor, self_test
from lda_core.threaded import EngineThread

__all__ = [
    "CaptureRequest",
    "Captured",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ContextLengthExceeded",
    "Densities",
    "Directions",
    "DoesNotFit",
    "Engine",
    "EngineConfig",
    "EngineStopped",
    "EngineStuck",
    "EngineThread",
    "IncompatibleTokenizers",
    "LDAError",
    "ModelPair",
    "Overdue",
    "PairConfig",
    "Prompt",
    "Request",
    "RequestError",
    "Sampling",
    "ScoreRequest",
    "Scored",
    "SelfTestFailed",
    "Steer",
    "TokenLogprobs",
    "UnsupportedArchitecture",
    "amplify",
    "encode",
    "noise_floor",
    "sample",
    "self_test",
]
