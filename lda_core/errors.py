"""What can go wrong, drawn as a tree. Everything here is something a caller can cause.

LDAError
├── ConfigError                a setting outside its range; names the field
├── CheckpointError            model files: missing, incomplete, pickled, with code in them
├── IncompatibleTokenizers     the two models do not share one vocabulary
├── UnsupportedArchitecture    the engine is not known to be exact on it
├── SelfTestFailed             the loaded pair does not compute what it should
├── RequestError               one request is wrong; names the field
│   ├── ContextLengthExceeded  prompt + max_new_tokens beyond the context
│   └── DoesNotFit             a single row larger than the whole key/value budget
├── Overdue                    a row was still waiting for a slot at its deadline
└── EngineStopped              the engine's thread has ended
    └── EngineStuck            it lives, and shows no step
"""


class LDAError(Exception):
    """Root of the tree."""


class ConfigError(LDAError, ValueError):
    pass


class CheckpointError(LDAError):
    pass


class IncompatibleTokenizers(LDAError):
    pass


class UnsupportedArchitecture(LDAError):
    pass


class SelfTestFailed(LDAError):
    pass


class RequestError(LDAError, ValueError):
    """`field` is the name of the request's field, `message` says what is allowed."""

    code = "invalid_value"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class DoesNotFit(RequestError):
    code = "does_not_fit"


class Overdue(LDAError):
    pass


class EngineStopped(LDAError):
    pass


class EngineStuck(EngineStopped):
    pass
