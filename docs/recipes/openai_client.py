"""The openai client on a running service: LDA_URL=http://127.0.0.1:8000 python openai_client.py"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import openai

URL = os.environ.get("LDA_URL", "http://127.0.0.1:8000") + "/v1"
OUT = os.environ.get("LDA_RECIPE_OUT")
PROMPT = "### Instruction:\nWhat is 4 plus 3?\n\n### Response:\n"
MESSAGES: Any = [{"role": "user", "content": "What is 4 plus 3?"}]

client = openai.OpenAI(base_url=URL, api_key="none")
found: list[dict[str, Any]] = []  # what was drawn, for the comparison


def keep(choice: Any, alpha: float, text: str) -> None:
    lda = choice.lda
    assert lda["alpha"] == alpha
    found.append({"alpha": alpha, "seed": lda["seed"], "text": text, **lda.get("logprobs", {})})


def models() -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["lda", "after", "before"], names
    assert client.models.retrieve("lda:alpha=2").id == "lda:alpha=2"


def completions() -> None:
    """Four samples; alpha in the body; log-probabilities under all three distributions."""
    answer = client.completions.create(
        model="lda",
        prompt=PROMPT,
        n=4,
        seed=7,
        max_tokens=24,
        logprobs=3,
        extra_body={"alpha": 2, "lda_logprobs": True},
    )
    assert len(answer.choices) == 4 and answer.usage is not None
    tokens = 0
    for choice in answer.choices:
        keep(choice, 2, choice.text)
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens is not None
        assert logprobs.token_logprobs == found[-1]["amplified"]
        assert "".join(t for t in logprobs.tokens if t != "</s>") == choice.text
        tokens += len(logprobs.tokens)
    assert answer.usage.completion_tokens == tokens


def chat() -> None:
    """alpha in the model's name."""
    answer = client.chat.completions.create(
        model="lda:alpha=2",
        messages=MESSAGES,
        seed=7,
        max_tokens=24,
        logprobs=True,
        top_logprobs=2,
        extra_body={"lda_logprobs": True},
    )
    (choice,) = answer.choices
    keep(choice, 2, choice.message.content or "")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.logprob for one in choice.logprobs.content] == found[-1]["amplified"]
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)


def streams() -> None:
    """The same, while it comes."""
    stream = client.chat.completions.create(
        model="after",
        messages=MESSAGES,
        seed=11,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage, first = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            first = first or choice
            text += choice.delta.content or ""
    assert usage is not None and usage.completion_tokens > 0
    keep(first, 0, text)


async def side_by_side() -> None:
    """Many at once, some streamed, without a thread."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as asynchronous:

        async def one(model: str, seed: int) -> tuple[Any, str]:
            answer = await asynchronous.completions.create(
                model=model, prompt=PROMPT, seed=seed, max_tokens=24
            )
            return answer.choices[0], answer.choices[0].text

        async def streamed(model: str, seed: int) -> tuple[Any, str]:
            first, text = None, ""
            async for chunk in await asynchronous.completions.create(
                model=model, prompt=PROMPT, seed=seed, max_tokens=24, stream=True
            ):
                first = first or chunk.choices[0]
                text += chunk.choices[0].text
            return first, text

        wanted = [("before", -1.0), ("after", 0.0), ("lda", 1.0), ("lda:alpha=4", 4.0)]
        calls = [
            how(model, 20 + i) for model, _ in wanted for i in range(2) for how in (one, streamed)
        ]
        answers = await asyncio.gather(*calls)
    for (choice, text), alpha in zip(
        answers, [a for _, a in wanted for _ in range(4)], strict=True
    ):
        keep(choice, alpha, text)


def errors() -> None:
    """Refused once, not tried again, and named."""
    for change, kind, param, code in [
        ({"extra_body": {"aplha": 2}}, openai.BadRequestError, "aplha", "unknown_field"),
        ({"extra_body": {"alpha": 1000}}, openai.BadRequestError, "alpha", "invalid_value"),
        ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 4000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty", "invalid_value"),
    ]:
        try:
            client.completions.create(**{"model": "lda", "prompt": PROMPT, **change})  # type: ignore[call-overload]
        except kind as error:
            assert (error.param, error.code) == (param, code), (error.param, error.code)
            assert error.response.headers["x-should-retry"] == "false"
            print(f"{error.status_code} {error.code}: {error.body['message']}")  # type: ignore[index]
        else:
            raise AssertionError(f"{change} was not refused")


if __name__ == "__main__":
    models()
    completions()
    chat()
    streams()
    asyncio.run(side_by_side())
    errors()
    for row in found:
        print(f"alpha {row['alpha']:>4}  seed {row['seed']:>2}  {row['text']!r}")
    if OUT:
        Path(OUT, "openai.json").write_text(json.dumps(found))
