"""What a client's `generate` answers: one row for each sample, and a list of them that can be
looked at and written down.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex, overload

from pydantic import BaseModel, ConfigDict

from deployments.schemas import Completion, Densities, FinishReason, TokenLogprobs
from jobs import client_files as files
from jobs.client_html import as_html
from jobs.report_text import visible
from jobs.rows import Row, RowLogprobs

SHOWN_CHARS = 60


class GeneratedRow(BaseModel):
    """One sample of one prompt at one alpha, or, with `error` set, why there is none.

    The fields are those of the service's `Completion`; its text is `completion`.
    """

    model_config = ConfigDict(frozen=True)

    prompt_id: str
    prompt: str
    alpha: float
    sample: int
    seed: int
    completion: str | None = None
    token_ids: list[int] = []
    finish_reason: FinishReason = "error"
    eos_index: int | None = None
    eos_text_offset: int | None = None
    prompt_tokens: int | None = None
    formatted_prompt: str | None = None
    error: str | None = None
    # Where asked for, per drawn token:
    logprobs: TokenLogprobs | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    kl: list[float] | None = None
    token_ends: list[int] | None = None
    densities: Densities | None = None
    watched: list[list[float]] | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    @classmethod
    def of(cls, completion: Completion, prompt_id: str, prompt: str, sample: int) -> "GeneratedRow":
        error = completion.error
        if completion.finish_reason == "error" and error is None:
            error = "failed without a reason"
        known = {name: value for name, value in completion if name in cls.model_fields}
        text = None if error is not None else completion.text
        return cls.model_construct(
            **{
                **known,
                "prompt_id": prompt_id,
                "prompt": prompt,
                "sample": sample,
                "completion": text,
                "error": error,
            }
        )

    def as_job_row(self) -> Row:
        """In the words of a run's rows.jsonl, unscored."""
        found = self.logprobs
        return Row(
            arm="generated",
            **self.model_dump(
                include={
                    *("prompt_id", "prompt", "alpha", "sample", "seed", "completion"),
                    *("token_ids", "finish_reason", "eos_index", "eos_text_offset"),
                    *("error", "token_ends"),
                }
            ),
            activated=None,
            activated_after_eos=None,
            scores={},
            logprobs=None if found is None else RowLogprobs(after=found.after, before=found.before),
        )


class Rows(list[GeneratedRow]):
    """Rows by prompt, then alpha, then sample, whatever the order they came in.

    In a notebook they show their texts, each token coloured by its log-ratio of *after* to
    *before* where `logprobs` were asked for.
    """

    @property
    def failed(self) -> "Rows":
        return Rows(row for row in self if row.failed)

    @property
    def good(self) -> "Rows":
        return Rows(row for row in self if not row.failed)

    def to_pandas(self) -> Any:
        """A DataFrame, a line for each row. Raises Refused without pandas."""
        return files.frame(self._records())

    def to_parquet(self, path: str | Path) -> None:
        """Raises Refused without pyarrow."""
        files.write_parquet(self._records(), Path(path))

    def write_jsonl(self, path: str | Path) -> None:
        files.write_jsonl(self._records(), Path(path))

    def write_csv(self, path: str | Path) -> None:
        """Lists as JSON; a text that a spreadsheet would calculate gets a `'` in front."""
        files.write_csv(self._records(), Path(path))

    def _records(self) -> list[dict[str, Any]]:
        return [row.model_dump() for row in self]

    def _repr_html_(self) -> str:
        return as_html([(row.as_job_row(), row.error) for row in self])

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        lines = [f"<{len(self)} rows{failed}>", *(_line(row) for row in self[:10])]
        return "\n".join(lines + [f"... and {len(self) - 10} more"] * (len(self) > 10))

    @overload
    def __getitem__(self, key: SupportsIndex) -> GeneratedRow: ...
    @overload
    def __getitem__(self, key: slice) -> "Rows": ...
    def __getitem__(self, key: SupportsIndex | slice) -> "GeneratedRow | Rows":
        if isinstance(key, slice):
            return Rows(super().__getitem__(key))
        return super().__getitem__(key)


def failed_rows(
    prompt_id: str, prompt: str, alpha: float, seeds: Iterable[int], error: str
) -> list[GeneratedRow]:
    return [
        GeneratedRow(
            prompt_id=prompt_id, prompt=prompt, alpha=alpha, sample=i, seed=seed, error=error
        )
        for i, seed in enumerate(seeds)
    ]


def _line(row: GeneratedRow) -> str:
    text = visible(f"error: {row.error}" if row.failed else row.completion or "")
    text = text.replace("\n", "⏎")
    shown = text[:SHOWN_CHARS] + "..." * (len(text) > SHOWN_CHARS)
    return f"{visible(row.prompt_id)} alpha {row.alpha:g} seed {row.seed}: {shown}"
