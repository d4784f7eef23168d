"""The words of the plain LDA server, whose clients run here unchanged, in terms of ours.

Its "chat template" is the Alpaca form. Beyond it: `n`, `seed`, `top_k`, `stop`,
`prompt_format`, `ignore_eos`, `logprobs`, and alpha outside [0, 10] as far as `Limits` allow.
"""

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, Tag

from deployments.schemas import (
    MAX_SEED,
    UNION_TAG,
    Completion,
    Finite,
    GenerateRequest,
    InvalidRequest,
    PairName,
    PromptFormat,
    Seed,
    Stops,
    Temperature,
    Text,
    TokenLogprobs,
    TopK,
    TopP,
    Wire,
    parse,
)

Prompt = Annotated[Text, Field(min_length=1)]


class _Decoding(Wire):
    """What all three endpoints share."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 80
    do_sample: bool = Field(True, description="false: greedy")
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    top_k: TopK = 0
    apply_chat_template: bool | None = Field(
        None, description="true (the default): the Alpaca form; false: raw"
    )
    prompt_format: PromptFormat | None = Field(None, description="instead of the former")
    system_prompt: Text | None = None
    seed: Seed | None = None
    stop: Stops = []
    logprobs: bool = False
    pair: PairName = None

    def _request(self, prompt: str, alpha: float, ignore_eos: bool, n: int = 1) -> GenerateRequest:
        form, template = self.prompt_format, self.apply_chat_template
        if form is not None and template is not None and template != (form != "raw"):
            raise InvalidRequest("prompt_format", "contradicts apply_chat_template")
        if form is None:
            form = "raw" if template is False else "alpaca"
        if form == "raw" and self.system_prompt is not None:
            raise InvalidRequest("system_prompt", "needs prompt_format alpaca or chat")
        return parse(
            GenerateRequest,
            {
                "prompt": prompt,
                "prompt_format": form,
                "system_prompt": self.system_prompt,
                "n": n,
                "alpha": alpha,
                "temperature": self.temperature if self.do_sample else 0.0,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "max_new_tokens": self.max_new_tokens,
                "seed": self.seed,
                "stop": self.stop,
                "ignore_eos": ignore_eos,
                "logprobs": self.logprobs,
                "pair": self.pair,
            },
        )


class LDARequest(_Decoding):
    prompt: Prompt
    alpha: Finite = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    ignore_eos: bool = False

    def request(self) -> GenerateRequest:
        return self._request(self.prompt, self.alpha, self.ignore_eos, self.n)


class LDABatchRequest(_Decoding):
    prompts: Annotated[list[Prompt], Field(fail_fast=True, min_length=1)]
    alpha: Annotated[
        Annotated[Finite, Tag(f"{UNION_TAG}number")]
        | Annotated[list[Finite], Field(fail_fast=True), Tag(f"{UNION_TAG}list")],
        Discriminator(lambda v: UNION_TAG + ("list" if isinstance(v, list) else "number")),
    ] = Field(1.0, description="one for all, or one per prompt")
    n: Annotated[int, Field(ge=1, description="samples of each prompt")] = 1
    ignore_eos: bool = Field(True, description="fixed length, the default of this endpoint")

    def requests(self, seed: int) -> list[GenerateRequest]:
        """One per prompt, in order, the i-th with `seed + i * n`.

        Raises InvalidRequest if the alphas do not match or the seeds grow too large.
        """
        if seed + len(self.prompts) * self.n - 1 > MAX_SEED:
            raise InvalidRequest("seed", f"seed + rows - 1 must be at most {MAX_SEED}")
        alphas = self.alpha if isinstance(self.alpha, list) else [self.alpha] * len(self.prompts)
        if len(alphas) != len(self.prompts):
            raise InvalidRequest(
                "alpha", f"has {len(alphas)} values for {len(self.prompts)} prompts"
            )
        return [
            self._request(prompt, alpha, self.ignore_eos, self.n).model_copy(
                update={"seed": seed + i * self.n}
            )
            for i, (prompt, alpha) in enumerate(zip(self.prompts, alphas, strict=True))
        ]

    def param(self, field: str, i: int) -> str:
        """Where a field of the i-th of `requests` stands in this body."""
        if field == "prompt":
            return f"prompts[{i}]"
        return f"alpha[{i}]" if field == "alpha" and isinstance(self.alpha, list) else field


class SideBySideRequest(_Decoding):
    prompt: Prompt
    ignore_eos: bool = False

    def request(self, alpha: float) -> GenerateRequest:
        return self._request(self.prompt, alpha, self.ignore_eos)


class Sample(BaseModel):
    """One completion; `text` is the formatted prompt with the completion behind it."""

    completion: str
    text: str
    tokens_generated: int
    stopped_early: bool
    finish_reason: str
    eos_index: int | None
    eos_text_offset: int | None
    seed: int
    alpha: float
    token_ids: list[int]
    logprobs: TokenLogprobs | None = None
    error: str | None = None

    @classmethod
    def fields_of(cls, done: Completion, max_new_tokens: int) -> dict[str, Any]:
        return {
            "completion": done.text,
            "text": done.formatted_prompt + done.text,
            "tokens_generated": len(done.token_ids),
            "stopped_early": len(done.token_ids) < max_new_tokens,
            **done.model_dump(
                include={
                    *("finish_reason", "eos_index", "eos_text_offset"),
                    *("seed", "alpha", "token_ids", "logprobs", "error"),
                }
            ),
        }


class LDAResult(Sample):
    """The first sample's fields, and where n > 1 was asked for all of them in `samples`."""

    prompt: str
    formatted_prompt: str
    samples: list[Sample] | None

    @classmethod
    def result_fields(
        cls, prompt: str, done: list[Completion], max_new_tokens: int
    ) -> dict[str, Any]:
        samples = [Sample.fields_of(completion, max_new_tokens) for completion in done]
        return {
            **samples[0],
            "prompt": prompt,
            "formatted_prompt": done[0].formatted_prompt,
            "samples": samples if len(samples) > 1 else None,
        }


class LDAResponse(LDAResult):
    model_after: str
    model_before: str


class RowError(BaseModel):
    """A prompt of a batch that could not be served; the others are not touched."""

    prompt: str
    error: dict[str, Any]


class LDABatchResponse(BaseModel):
    results: list[LDAResult | RowError]
    alpha: float | list[float]
    model_after: str
    model_before: str
    batch_size: int


class ModelAnswer(Sample):
    model_id: str


class SideBySideResponse(BaseModel):
    prompt: str
    model_1: ModelAnswer
    model_2: ModelAnswer


class TokenizerCompatibility(BaseModel):
    compatible: bool
    vocab_size_1: int
    vocab_size_2: int
    vocabs_match: bool
    warning: str | None
