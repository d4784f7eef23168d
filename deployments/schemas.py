"""Words of the wire: what a client may say and what it is answered. Needs pydantic only.

One request asks for `n` samples of one prompt. Everything is checked here, once; past this
door the engine's own dataclasses are trusted.
"""

import base64
import binascii
import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

PromptFormat = Literal["raw", "alpaca", "chat"]
FinishReason = Literal["length", "stop", "eos", "error"]

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_STOPS = 16
MAX_GRID = 16
MAX_WATCHED = 16
MAX_CONTINUATIONS = 1024
MAX_COMPLETIONS = 256
MAX_TOP_LOGPROBS = 20
MAX_STREAMED_ALPHAS = 8
UNION_TAG = "~"  # begins the tags of unions, which are left out of a field's path
CLOSE = 0.7  # of a suggestion to what was sent: steer is no misspelt seed (0.67), sead is (0.75)
MAX_STOP_CHARS = 256


class InvalidRequest(ValueError):
    """A request that can never succeed as it is. Answered with 400; never contains the input.

    Attributes: `param` the field's path, for instance `prompts[3]`; `message`; `code`.
    """

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(param, message, code)  # positional, so that it survives pickling
        self.param = param
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return f"{self.param}: {self.message}" if self.param else self.message


class ReplicaUnavailable(RuntimeError):
    """The replica cannot answer now; another one, or the same later, can."""

    code = "unavailable"

    @property
    def told(self) -> str:
        """What a client may read: where the words are not ours alone, none of them."""
        return f"no replica answers ({type(self).__name__})"


class Overdue(ReplicaUnavailable):
    """The request's time was over before there was anything to answer: it waited, or was not done.
    Others do not wait less: it is not sent again at once."""

    code = "overdue"

    @property
    def told(self) -> str:
        return "not answered within max_request_s; try later, or ask for less at once"


class NotReady(ReplicaUnavailable):
    """Why a pair, or which of several, does not answer: `message` is ours, `code` its kind."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code)  # positional, so that it survives pickling
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return self.message

    @property
    def told(self) -> str:
        return self.message


def _finite(value: object) -> object:
    """Refuses what JSON and Python let through as a number but no sampler can use."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


_LONE_SURROGATE = "must not contain a lone surrogate"


def _valid_unicode(value: object) -> object:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()  # no loop of ours over millions of characters
        except UnicodeEncodeError:
            raise ValueError(_LONE_SURROGATE) from None
    return value


def _from_base64(value: object) -> object:
    """JSON has no bytes."""
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError("must be base64") from None
    return value


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


Finite = Annotated[float, BeforeValidator(_finite)]
Text = Annotated[str, BeforeValidator(_valid_unicode)]
Temperature = Annotated[Finite, Field(ge=0.0, le=100.0)]
TopP = Annotated[Finite, Field(gt=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOP_K, description="0: no limit")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
TokenId = Annotated[int, Field(ge=0)]
Bytes = Annotated[
    bytes, BeforeValidator(_from_base64), PlainSerializer(_to_base64, when_used="json")
]
# fail_fast: only the first error is told, and two million of them take gigabytes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
# In JSON and so from a client's `answer.json()` a list of two.
TokenLogprob = Annotated[tuple[int, float], Field(strict=False)]
Models = Literal["after", "before", "both"]
Grid = Annotated[
    list[Finite],
    Field(
        fail_fast=True,
        max_length=MAX_GRID,
        description="alphas whose densities are recorded at every token",
    ),
]
PairName = Annotated[
    Text | None,
    Field(description="of a service with several pairs; default: the only one, or lda"),
]
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(fail_fast=True, max_length=MAX_STOPS),
]


class Wire(BaseModel):
    """Strict: no unknown key, no `"2"` or `true` for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(Wire):
    role: Literal["system", "user", "assistant"]
    content: Text


class Steer(Wire):
    """A direction that is added to one layer's output, from the prompt's last token on.

    Either the `vector` itself, of the models' width, or the name of a `trait` that the service was
    started with. Its direction alone counts: `coefficient` is the length of what is added.
    """

    trait: Text | None = None
    vector: Annotated[list[Finite], Field(fail_fast=True, min_length=1)] | None = None
    layer: Annotated[int, Field(ge=0, description="counted from 0")]
    coefficient: Finite
    models: Models = "both"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.trait is None) == (self.vector is None):
            raise ValueError("give exactly one of trait and vector")
        return self


class GenerateRequest(Wire):
    """`n` samples of one prompt from `after + alpha * (after - before)`.

    Sample `i` is drawn with `seed + i`; without a seed the service picks one and answers it.
    The ranges of alpha, n and max_new_tokens that the service allows are its `Limits`.
    """

    prompt: Annotated[Text, Field(min_length=1)] | None = None
    prompt_ids: TokenIds | None = Field(
        None, description="the prompt as it is read, token by token"
    )
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    open_prompt: Text | None = Field(
        None,
        description="a prompt that the model goes on writing: what the form puts behind a prompt "
        "is left out. Empty: the form's own beginning alone",
    )
    prompt_format: PromptFormat | None = Field(
        None, description="default: raw for a prompt, chat for messages"
    )
    system_prompt: Text | None = None
    prefill: Text = Field(
        "", description="what the answer begins with: the models go on from there; not in its text"
    )
    allow_special_tokens: bool = Field(
        False, description="read special-token text in the prompt as special tokens"
    )
    n: Annotated[int, Field(ge=1)] = 1
    alpha: Finite = 1.0
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 80
    seed: Seed | None = None
    stop: Stops = []
    ignore_eos: bool = Field(False, description="generate exactly max_new_tokens")
    logprobs: bool = False
    grid: Grid = []
    watch: Annotated[
        list[TokenId],
        Field(
            fail_fast=True,
            max_length=MAX_WATCHED,
            description="tokens whose log-probability at this alpha is wanted at every step",
        ),
    ] = []
    amplify_first: Annotated[
        int, Field(ge=0, description="amplify the first so many tokens only; 0: all")
    ] = 0
    amplify_min_kl: Annotated[
        Finite, Field(ge=0.0, description="amplify only where KL(after||before) is at least this")
    ] = 0.0
    plausible: Annotated[
        Finite,
        Field(
            ge=0.0,
            le=1.0,
            description="amplified, only tokens that *after* gives at least this share of its "
            "best token's probability",
        ),
    ] = 0.0
    steer: Steer | None = None
    top_logprobs: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_TOP_LOGPROBS,
            description="so many of the likeliest tokens at every step; with logprobs",
        ),
    ] = 0
    min_tokens: Annotated[
        int,
        Field(ge=0, description="no EOS is drawn and no stop string counts before so many tokens"),
    ] = 0
    kl: bool = Field(False, description="KL(after||before) at every step")
    pair: PairName = None

    @model_validator(mode="after")
    def _grid_needs_chance(self) -> Self:
        if self.grid and self.temperature == 0:
            raise ValueError("grid needs a temperature above 0")
        if len(set(self.grid)) < len(self.grid):
            raise ValueError("grid must not hold an alpha twice")
        return self

    @field_validator("min_tokens")
    @classmethod
    def _min_tokens_fit(cls, value: int, info: ValidationInfo) -> int:
        # Fields that were refused themselves are not there.
        if value and info.data.get("grid"):
            raise ValueError("must be 0 together with a grid")
        if value > info.data.get("max_new_tokens", value):
            raise ValueError("must be at most max_new_tokens")
        return value

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [self.prompt, self.prompt_ids, self.messages, self.open_prompt]
        if given.count(None) != 3:
            raise ValueError("give exactly one of prompt, prompt_ids, messages and open_prompt")
        if self.prompt_ids is not None and self.prompt_format not in (None, "raw"):
            raise ValueError("prompt_ids need prompt_format raw")
        if self.messages is not None and self.prompt_format not in (None, "chat"):
            raise ValueError("messages need prompt_format chat")
        if self.messages is not None and self.system_prompt is not None:
            raise ValueError("with messages the system prompt is a message of role system")
        if self.messages is None and self.system_prompt is not None:
            if self.prompt_format not in ("alpaca", "chat"):
                raise ValueError("system_prompt needs prompt_format alpaca or chat")
        if self.prefill and self.prompt is None and self.messages is None:
            raise ValueError("prefill needs prompt or messages")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 must be at most {MAX_SEED}")
        return self

    @property
    def effective_format(self) -> PromptFormat:
        return self.prompt_format or ("raw" if self.messages is None else "chat")


class Continuation(Wire):
    """Text or token ids, after `given` token ids that belong to the answer already."""

    text: Annotated[Text, Field(min_length=1)] | None = None
    token_ids: TokenIds | None = None
    given: Annotated[list[TokenId], Field(fail_fast=True)] = []

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("give exactly one of text and token_ids")
        return self


class TokenLogprobs(Wire):
    """Per drawn token: log-probability at temperature 1 under each of the three distributions."""

    after: list[float]
    before: list[float]
    amplified: list[float]


class Densities(Wire):
    """Per drawn token (T) and alpha of the grid (K), at the request's temperature.

    The log-density of token t at alpha a is
    `((1 + a) * after[t] - a * before[t]) / temperature - normalisers[t][a]`. `drawn` is the
    density it was really drawn with at each alpha, where gates, `plausible`, top_p or top_k made
    that another one. What is impossible is -1e30.
    """

    alphas: list[float]
    normalisers: list[list[float]]  # (T, K)
    drawn: list[list[float]] | None = None  # (T, K)


class Completion(Wire):
    """One finished row. `text` never contains the prompt.

    Where asked for: `top_logprobs`, for each token the likeliest ones and their log-probabilities
    in the sense of `logprobs.amplified`, best first; `kl`, for each token KL(after||before) in
    nats, 1e30 where it is infinite.

    `eos_index` is the place of the first EOS in `token_ids`, `eos_text_offset` the number of
    characters of `text` before it; both None if there was none. A row that failed has
    `finish_reason` "error" and says why in `error`; it is never "did not fire".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    eos_index: int | None
    eos_text_offset: int | None
    seed: int
    alpha: float
    prompt_tokens: int
    formatted_prompt: str
    logprobs: TokenLogprobs | None = None
    densities: Densities | None = None
    watched: list[list[float]] | None = Field(None, description="per token, of each of `watch`")
    token_ends: list[int] | None = Field(
        None, description="with logprobs or grid: characters of `text` settled by each token"
    )
    top_logprobs: list[list[TokenLogprob]] | None = None
    kl: list[float] | None = None
    error: str | None = None

    @property
    def text_before_eos(self) -> str:
        return self.text if self.eos_text_offset is None else self.text[: self.eos_text_offset]

    @property
    def text_after_eos(self) -> str:
        return "" if self.eos_text_offset is None else self.text[self.eos_text_offset :]


class StreamRequest(GenerateRequest):
    """The same prompt at several alphas at once, with one seed."""

    alphas: Annotated[
        list[Finite],
        Field(
            fail_fast=True,
            max_length=MAX_STREAMED_ALPHAS,
            description="side by side, each with the same seed; none: alpha alone",
        ),
    ] = []

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.alphas and "alpha" in self.model_fields_set:
            raise ValueError("give one of alpha and alphas")
        return self

    @field_validator("alphas")
    @classmethod
    def _differ(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("must not hold an alpha twice")
        return value

    def requests(self) -> list[GenerateRequest]:
        """One for each alpha."""
        fields = {name: getattr(self, name) for name in GenerateRequest.model_fields}
        return [
            GenerateRequest.model_construct(**{**fields, "alpha": alpha})
            for alpha in self.alphas or [self.alpha]
        ]


class Piece(Wire):
    """What came of one sample since its last piece.

    The `text` of all pieces of a sample is its completion's; what may still change, half a
    character or what may become a stop string, is held back. The lists are those of the new
    tokens. The last piece of a sample has its `completion`.
    """

    index: int = Field(description="of the sample, from 0")
    alpha: float
    text: str
    token_ids: list[int]
    logprobs: TokenLogprobs | None = None
    top_logprobs: list[list[TokenLogprob]] | None = None
    kl: list[float] | None = None
    completion: Completion | None = None


class ScoreRequest(Wire):
    """Teacher forcing: how likely each continuation of one prompt is, at every alpha of `grid`.

    The answer is one scored piece for each continuation, in their order.
    """

    prompt: Annotated[Text, Field(min_length=1)] | None = None
    prompt_ids: TokenIds | None = Field(
        None, description="the prompt as it is read, token by token"
    )
    prompt_format: PromptFormat = "raw"
    system_prompt: Text | None = None
    allow_special_tokens: bool = False
    continuations: Annotated[
        list[Continuation], Field(fail_fast=True, min_length=1, max_length=MAX_CONTINUATIONS)
    ]
    grid: Grid = [0.0]
    temperature: Annotated[Finite, Field(gt=0.0, le=100.0)] = 1.0
    top: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_TOP_LOGPROBS,
            description="so many of the likeliest tokens at every place, under every alpha",
        ),
    ] = 0
    pair: PairName = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ValueError("give exactly one of prompt and prompt_ids")
        if self.prompt_ids is not None and self.prompt_format != "raw":
            raise ValueError("prompt_ids need prompt_format raw")
        if self.prompt_ids is not None and self.system_prompt is not None:
            raise ValueError("system_prompt needs prompt_format alpaca or chat")
        return self


class Scored(Wire):
    """One continuation of T tokens: log-probabilities at temperature 1, and densities.

    `at` is each token's log-probability under each alpha of the grid, (T, K), at the request's
    temperature; `top`, where asked for, (T, K) lists of the likeliest tokens there, best first.
    What is impossible is -1e30.
    """

    token_ids: list[int]
    after: list[float]
    before: list[float]
    densities: Densities
    at: list[list[float]] = []
    top: list[list[list[TokenLogprob]]] | None = None


class CaptureRequest(Wire):
    """Teacher forcing: what both models' residual streams hold at every token of one prompt and
    each of its completions, along given directions.

    The answer is one capture for each completion, in their order; without completions one of the
    prompt alone.
    """

    prompt: Annotated[Text, Field(min_length=1)]
    prompt_format: PromptFormat = "raw"
    system_prompt: Text | None = None
    allow_special_tokens: bool = False
    completions: Annotated[
        list[Continuation], Field(fail_fast=True, max_length=MAX_COMPLETIONS)
    ] = []
    traits: Annotated[
        Bytes | None,
        Field(
            description="a safetensors file whose keys are the traits' names, each with [layers, "
            "width] (or [width], the same at every layer); in JSON base64. A file of "
            "jobs/traits.py is one trait, its keys kinds of vector: jobs/trait_files.py makes one "
            "file of several. Default: the traits that the service was started with"
        ),
    ] = None
    models: Models = "both"
    layer: Annotated[
        int | None, Field(ge=0, description="of which attention and MLP are wanted, too")
    ] = None
    raw: bool = Field(False, description="the residual streams themselves")
    mean: bool = Field(False, description="their mean over the completion's tokens")
    pair: PairName = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if any(completion.given for completion in self.completions):
            raise ValueError("completions must be whole: they have no given tokens")
        return self


class Captured(Wire):
    """One text of T tokens, prompt and completion; row `prompt_tokens + k` is completion token k.

    `tensors` is a safetensors file. For each model R, over L layers, three points (layer input,
    after attention, layer output), K traits, in float32: `R.norms` [T, L, 3]; `R.scores`
    [T, L, 3, K], the projections on the unit vectors of `traits`; where asked for `R.mean`
    [L, 3, D], and in the model's dtype `R.residual` [T, L, 3, D], and of one layer `R.q`, `R.k`,
    `R.v` [T, heads, d], `R.attention` [heads, T, T], `R.mlp_up`, `R.mlp_activation` [T, F],
    `R.mlp_down` [T, D].
    """

    prompt_tokens: int
    token_ids: list[int]
    tokens: list[str]
    traits: list[str]
    tensors: Bytes


class PairInfo(Wire):
    """What the resident pair is; goes into the manifest of every run."""

    after: str
    before: str
    adapter: str | None
    after_sha256: dict[str, str] = Field(description="weight file name to hash")
    before_sha256: dict[str, str]
    adapter_sha256: dict[str, str]
    tokenizer_sha256: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int = Field(description="tokens that both models have; mixed, drawn, accepted")
    tokenizer_size_after: int
    tokenizer_size_before: int
    context_length: int
    layers: int
    hidden_size: int
    traits: dict[str, str] = Field(
        {}, description="those that `steer` and captures know: name to its file's hash"
    )
    notices: list[str]
    versions: dict[str, str]
    commit: str | None


class PairInfos(Wire):
    """What each of several pairs is, by its name."""

    pairs: dict[str, PairInfo]


class Limits(BaseModel):
    """What this service allows; part of the application's config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha_min: Finite = -20.0
    alpha_max: Finite = 50.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 4096
    max_n: Annotated[int, Field(ge=1)] = 256
    max_batch_prompts: Annotated[int, Field(ge=1)] = 1024
    max_prompt_chars: Annotated[int, Field(ge=1)] = 400_000
    batch_rows_in_flight: Annotated[
        int, Field(ge=1, description="of one HTTP batch, so that others are served meanwhile")
    ] = 64
    max_request_s: Annotated[
        Finite, Field(gt=0.0, description="a row that still decodes then ends with what it has")
    ] = 600.0
    max_capture_numbers: Annotated[
        int, Field(ge=1, description="norms and scores of one answer of POST /capture")
    ] = 20_000_000
    max_capture_bytes: Annotated[
        int, Field(ge=1, description="tensors of one capture by handle, raw and depth included")
    ] = 16 * 2**30

    def check(self, request: GenerateRequest | ScoreRequest | CaptureRequest) -> None:
        """Raises InvalidRequest naming the field and the allowed range."""

        def within(field: str, value: float, low: float, high: float) -> None:
            if not low <= value <= high:
                raise InvalidRequest(field, f"must be between {low:g} and {high:g}")

        if not isinstance(request, CaptureRequest):
            for i, alpha in enumerate(request.grid):
                within(f"grid[{i}]", alpha, self.alpha_min, self.alpha_max)
        chars = len(request.prompt or "") + len(request.system_prompt or "")
        messages = None
        if isinstance(request, GenerateRequest):
            chars += len(request.open_prompt or "") + len(request.prefill)
            within("alpha", request.alpha, self.alpha_min, self.alpha_max)
            within("max_new_tokens", request.max_new_tokens, 1, self.max_new_tokens)
            within("n", request.n, 1, self.max_n)
            messages = request.messages
            chars += sum(len(m.content) for m in messages or [])
        if not isinstance(request, CaptureRequest) and request.prompt_ids is not None:
            if len(request.prompt_ids) > self.max_prompt_chars:
                raise InvalidRequest(
                    "prompt_ids",
                    f"has {len(request.prompt_ids)} tokens, at most {self.max_prompt_chars} "
                    "are allowed",
                )
        if chars > self.max_prompt_chars:
            raise InvalidRequest(
                "prompt" if messages is None else "messages",
                f"has {chars} characters, at most {self.max_prompt_chars} are allowed",
            )


def parse(model: type[ModelT], data: object) -> ModelT:
    """`data` as `model`; raises InvalidRequest naming the first bad field, echoing no value."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error.errors(include_input=False, include_url=False), model) from None


def explain(errors: Any, model: type[BaseModel] | None = None) -> InvalidRequest:
    """The first of pydantic's errors as an InvalidRequest, with a suggestion for a typo."""
    first: Mapping[str, Any] = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequest("", "the body is not valid JSON", "invalid_json")
    loc = [part for part in first["loc"] if part != "body" and str(part)[:1] != UNION_TAG]
    param = ""
    for part in loc:
        param += f"[{part}]" if isinstance(part, int) else (f".{part}" if param else str(part))
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields) if model else []
        said = str(loc[-1])  # in which difflib looks at every character
        close = difflib.get_close_matches(said, known, n=1, cutoff=CLOSE) if len(said) <= 80 else []
        hint = f"; did you mean {close[0]}?" if close else ""
        shown = "".join(c if c.isprintable() else "?" for c in param[:80])
        return InvalidRequest(shown, f"unknown field{hint}", "unknown_field")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    if first["type"] in ("model_attributes_type", "model_type", "dict_type") or not param:
        if first["type"] != "value_error":
            message = "the body must be a JSON object, sent with content-type: application/json"
    if first["type"] == "string_unicode":
        message = _LONE_SURROGATE
    elif first["type"] == "too_short":
        message = f"must have a length of at least {first['ctx']['min_length']}"
    elif first["type"] == "too_long":
        message = f"must have a length of at most {first['ctx']['max_length']}"
    return InvalidRequest(param, message)
