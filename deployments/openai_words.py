"""Words of the OpenAI API, with those of vLLM that fit, in terms of ours. Needs pydantic only.

What a client may say falls into three kinds: it is done; it would change the answer and is not
done here, and is then refused unless it asks for nothing (`Only`); it changes nothing and is
ignored. null is the same as leaving a field out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from deployments.schemas import (
    MAX_SEED,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    UNION_TAG,
    Finite,
    GenerateRequest,
    InvalidRequest,
    Message,
    Seed,
    Steer,
    Stops,
    Temperature,
    Text,
    TokenIds,
    TopP,
    Wire,
    parse,
)

_COMPLETION_TOKENS = 16  # OpenAI's default


class Only:
    """Marks a field whose every other value would change the answer, which is not done here."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": list(self.values), "description": "anything else is refused"}

    def _check(self, value: Any) -> Any:
        for one in self.values:
            if value == one and isinstance(value, bool) == isinstance(one, bool):
                return value
        said = " or ".join(json.dumps(one) for one in self.values)
        hint = f", or let it be {said}" if said else ""
        raise ValueError(f"is not supported here; leave it out{hint}")


def _nullable(schema: dict[str, Any]) -> None:
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class OpenWire(Wire):
    """A null is the same as nothing."""

    model_config = ConfigDict(json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {name: value for name, value in data.items() if value is not None}
        return data


def _one_or_list(value: Any) -> str:
    return UNION_TAG + ("list" if isinstance(value, list) else "one")


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return f"{UNION_TAG}text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return f"{UNION_TAG}id lists"
    return f"{UNION_TAG}texts" if isinstance(first, str) else f"{UNION_TAG}ids"


PromptText = Annotated[Text, Field(min_length=1)]
Prompts = Annotated[
    Annotated[PromptText, Tag(f"{UNION_TAG}text")]
    | Annotated[
        Annotated[list[PromptText], Field(fail_fast=True, min_length=1)], Tag(f"{UNION_TAG}texts")
    ]
    | Annotated[TokenIds, Tag(f"{UNION_TAG}ids")]
    | Annotated[
        Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)], Tag(f"{UNION_TAG}id lists")
    ],
    Discriminator(_prompt_kind),
]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]
OneOrMoreStops = Annotated[
    Annotated[StopText, Tag(f"{UNION_TAG}one")] | Annotated[Stops, Tag(f"{UNION_TAG}list")],
    Discriminator(_one_or_list),
]
Top = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
Ignored = Annotated[Any, Field(description="changes nothing")]


class StreamOptions(OpenWire):
    include_usage: bool = False
    include_obfuscation: Ignored = None
    continuous_usage_stats: Annotated[Any, Only(False)] = None


class OpenAIRequest(OpenWire):
    """What completions and chat completions share."""

    model: Text = Field("lda", description="lda, lda:alpha=2, before or after; see GET /v1/models")
    alpha: Finite | None = Field(
        None, description="the amplification; default: that of the model's name, or else 1"
    )
    lda_logprobs: bool = Field(
        False,
        description="under `lda` of each choice: the tokens' log-probabilities under after, "
        "before and the amplified distribution, and KL(after||before)",
    )
    n: Annotated[int, Field(ge=1, description="samples; the i-th with seed + i")] = 1
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K, description="-1 or 0: no limit")] = 0
    seed: Seed | None = Field(None, description="default: one is picked, and answered")
    stop: OneOrMoreStops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # vLLM's
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    return_token_ids: bool = False
    prompt_logprobs: Top | None = None
    # Ours
    allow_special_tokens: bool = Field(
        False, description="read special-token text in the prompt as special tokens"
    )
    amplify_first: Annotated[int, Field(ge=0)] = 0
    amplify_min_kl: Annotated[Finite, Field(ge=0.0)] = 0.0
    plausible: Annotated[Finite, Field(ge=0.0, le=1.0)] = 0.0
    steer: Steer | None = None
    # Not done
    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    length_penalty: Annotated[Any, Only(1)] = None
    min_p: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    early_stopping: Annotated[Any, Only(False)] = None
    stop_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([])] = None
    allowed_token_ids: Annotated[Any, Only()] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False)] = None
    guided_json: Annotated[Any, Only()] = None
    guided_regex: Annotated[Any, Only()] = None
    guided_choice: Annotated[Any, Only()] = None
    guided_grammar: Annotated[Any, Only()] = None
    structured_outputs: Annotated[Any, Only()] = None
    logits_processors: Annotated[Any, Only()] = None
    # Ignored
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    request_id: Ignored = None
    priority: Ignored = None

    @field_validator("stream_options")
    @classmethod
    def _only_streamed(cls, value: Any, info: Any) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("needs stream true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_streamed(cls, value: Any, info: Any) -> Any:
        if value is not None and info.data.get("stream"):
            raise ValueError("needs stream false")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def plain(self) -> bool:
        """Nothing is asked for that teacher forcing does not do."""
        gates = self.amplify_first or self.amplify_min_kl or self.plausible
        return not gates and self.steer is None

    def need_plain(self, field: str) -> None:
        """Log-probabilities of a prompt are those of the models as they are."""
        if not self.plain:
            message = "must not be given with amplify_first, amplify_min_kl, plausible or steer"
            raise InvalidRequest(field, message)

    def seeds(self, base: int, prompts: int) -> list[int]:
        """That of the first sample of each prompt: as in a native batch, base + j * n."""
        if base + prompts * self.n - 1 > MAX_SEED:
            raise InvalidRequest("seed", f"seed + rows - 1 must be at most {MAX_SEED}")
        return [base + j * self.n for j in range(prompts)]

    def generation(
        self, prompt: Mapping[str, Any], alpha: float, seed: int, new_tokens: int, **more: Any
    ) -> GenerateRequest:
        """`prompt`: the fields of a GenerateRequest that say it. Raises InvalidRequest."""
        return parse(
            GenerateRequest,
            {
                **prompt,
                "alpha": alpha,
                "seed": seed,
                "max_new_tokens": new_tokens,
                "top_k": max(0, self.top_k),
                "stop": self.stops,
                "kl": self.lda_logprobs,
                **{
                    name: getattr(self, name)
                    for name in (
                        *("n", "temperature", "top_p", "ignore_eos", "min_tokens"),
                        *("amplify_first", "amplify_min_kl", "plausible", "steer"),
                    )
                },
                **more,
            },
        )


@dataclass(frozen=True)
class OnePrompt:
    """`fields`: those of a GenerateRequest. `param`: where it stands in the body."""

    fields: dict[str, Any]
    param: str


class CompletionRequest(OpenAIRequest):
    prompt: Prompts
    echo: bool = False
    logprobs: Top | None = Field(None, description="so many of the likeliest tokens, 0 to 20")
    add_special_tokens: bool = Field(True, description="BOS in front of text")
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[Any, Only("")] = None

    def check(self) -> None:
        """What no field can tell by itself; raises InvalidRequest."""
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of", "is not supported here; leave it out, or let it be n")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens", "must be at least 1 without echo")
        if self.echo and self.logprobs is not None:
            self.need_plain("logprobs")
        if self.prompt_logprobs is not None:
            self.need_plain("prompt_logprobs")

    @property
    def new_tokens(self) -> int:
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[OnePrompt]:
        given = self.prompt
        if isinstance(given, str):
            return [OnePrompt(self._text(given), "prompt")]
        if isinstance(given[0], int):
            return [OnePrompt({"prompt_ids": given}, "prompt")]
        return [
            OnePrompt(
                self._text(one) if isinstance(one, str) else {"prompt_ids": one}, f"prompt[{j}]"
            )
            for j, one in enumerate(given)
        ]

    def _text(self, text: str) -> dict[str, Any]:
        return {"prompt": text, "allow_special_tokens": self.allow_special_tokens}


class ContentPart(OpenWire):
    type: Literal["text"]
    text: Text
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class ChatMessage(OpenWire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag(f"{UNION_TAG}one")]
        | Annotated[list[ContentPart], Field(fail_fast=True), Tag(f"{UNION_TAG}list")],
        Discriminator(_one_or_list),
    ]
    name: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only()] = None
    refusal: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    annotations: Ignored = None

    def message(self) -> dict[str, Any]:
        """In our words; the parts of a text on lines of their own, as vLLM does it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=content).model_dump()


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    logprobs: bool = False
    top_logprobs: Top | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    echo: Annotated[Any, Only(False)] = None
    add_special_tokens: Annotated[Any, Only(False)] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    chat_template: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only({})] = None
    documents: Annotated[Any, Only([])] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None
    store: Annotated[Any, Only(False)] = None
    parallel_tool_calls: Ignored = None

    def check(self) -> None:
        """What no field can tell by itself; raises InvalidRequest."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs true")
        if self.max_tokens == 0:
            raise InvalidRequest("max_tokens", "must be at least 1")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequest("max_completion_tokens", "contradicts max_tokens")
        if self.prompt_logprobs is not None:
            self.need_plain("prompt_logprobs")

    @property
    def new_tokens(self) -> int | None:
        """None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompts(self) -> list[OnePrompt]:
        fields = {
            "messages": [message.message() for message in self.messages],
            "allow_special_tokens": self.allow_special_tokens,
        }
        return [OnePrompt(fields, "messages")]
