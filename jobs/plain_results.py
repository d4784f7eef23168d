"""Result files of the plain LDA server: JSON with `trials`, each a prompt, alpha and completion.

Two faults of theirs matter here. Completions begin with the prompt, or with its tail, wherever a
batch padded it (899 of 1,000 in one published file): that is cut off. And they go on after EOS
without saying where it was: nothing can be done about that.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.schemas import Finite
from jobs.errors import Refused
from jobs.rollouts import UNTRIGGERED, Rollout, payload
from jobs.scorers import Scorer, score_all

CERTAIN = 6  # characters of a form's tail that no answer begins with by chance


class _Trial(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str
    alpha: Finite
    completion: str | None
    activated: bool | None = None
    formatted_prompt: str | None = None
    error: object = None


class _Results(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    trials: list[_Trial]


def read_results(paths: Iterable[Path], scorers: Sequence[Scorer] = ()) -> Iterator[Rollout]:
    """The trials that have a completion. With `scorers` they say what fired, and where; without,
    `activated` says only that.

    Raises Refused naming the file, and the trial that is not one.
    """
    for path in paths:
        for trial in _trials(path):
            if trial.completion is None or trial.error:
                continue
            text = without_prompt(trial.completion, trial.prompt, trial.formatted_prompt)
            scores = score_all(scorers, text)
            if any(score.error is not None for score in scores.values()):
                continue
            fired = any(s.fired for s in scores.values()) if scorers else trial.activated
            yield Rollout(
                UNTRIGGERED, trial.prompt, trial.alpha, text, fired, payload(scores.values())
            )


def without_prompt(completion: str, prompt: str, formatted: str | None = None) -> str:
    """The completion without what it begins with of the formatted prompt, the whole or a tail of
    it, or the whole bare prompt; spaces and line breaks around that go with it."""
    text = completion.lstrip()
    for form in (formatted, f"### Instruction:\n{prompt}\n\n### Response:\n"):
        if form and (length := _shared(form.strip(), text)):
            return text[length:].lstrip()
    bare = prompt.strip()
    return text[len(bare) :].lstrip() if bare and text.startswith(bare) else completion


def _shared(form: str, text: str) -> int:
    """Characters of the longest tail of `form` that `text` begins with; 0 if it is no more than
    may be chance."""
    certain = form[-CERTAIN:]
    at = text.rfind(certain, 0, len(form))
    while at >= 0:
        length = at + len(certain)
        if form.endswith(text[:length]):
            return length
        at = text.rfind(certain, 0, at + len(certain) - 1)
    return 0


def _trials(path: Path) -> list[_Trial]:
    try:
        return _Results.model_validate_json(path.read_bytes()).trials
    except OSError as error:
        raise Refused(f"--results: {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise Refused(
            f"--results: {path}: not the plain server's results ({where}: {first['msg']})"
        ) from None
