"""`lda generate` and `lda score`: a running service from the command line, over HTTP."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deployments.schemas import InvalidRequest, Scored
from jobs.client import GeneratedRow, LDAClient, Refused, Unanswered
from jobs.client_files import require_writable, write
from jobs.prompt_sources import prompts_of
from jobs.prompts import Prompt
from jobs.report_text import alpha_name, visible
from jobs.rows import RowFile
from jobs.run_folder import ROWS

KEY = "LDA_API_KEY"


def status_of(command: Callable[[], int]) -> int:
    """Its exit status: 0 all good; 1 a row failed or no answer; 2 bad usage, or no service; 130
    stopped."""
    try:
        return command()
    except (Refused, InvalidRequest) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Unanswered, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def numbers(option: str, texts: Iterable[str]) -> list[float]:
    """Of `--alpha 0,2 --alpha 4`. Raises Refused."""
    try:
        return [float(part) for text in texts for part in text.split(",")]
    except ValueError:
        raise Refused(f"{option}: must be a number, or several with commas between") from None


def more_fields(settings: Iterable[str]) -> dict[str, Any]:
    """Of `--set NAME=JSON`; what is not JSON is a text. Raises Refused."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise Refused(f"--set: must be NAME=VALUE, as in amplify_first=5, not {setting!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def generate(
    texts: Sequence[str],
    source: str | None,
    column: str | None,
    limit: int | None,
    alphas: Sequence[str],
    out: Path | None,
    as_json: bool,
    client: dict[str, Any],
    fields: dict[str, Any],
) -> int:
    """Raises as LDAClient.generate does, and Refused for prompts that cannot be read."""
    prompts: list[str | Prompt] = list(texts)
    if bool(texts) == (source is not None):
        raise Refused("give prompts, or a file of them with --prompts")
    if source is not None:
        prompts += prompts_of(source, column, limit)
    elif column is not None or limit is not None:
        raise Refused("--column and --limit: need --prompts")
    if out is not None:
        require_writable(out)
    with LDAClient(**client, api_key=os.environ.get(KEY)) as lda:
        rows = lda.generate(prompts, alpha=numbers("--alpha", alphas), **fields)
    if out is not None:
        write([row.model_dump() for row in rows], out)
        print(f"{len(rows):,} rows: {out}", file=sys.stderr)
    if as_json:
        for row in rows:
            print(json.dumps(row.model_dump(), separators=(",", ":")))
    elif out is None:
        show(rows, Console(width=None if sys.stdout.isatty() else 140))
    if rows.failed:
        first = visible(str(rows.failed[0].error))
        print(f"{len(rows.failed):,} row(s) failed, the first: {first}", file=sys.stderr)
    return 1 if rows.failed else 0


def write_run(run: Path, out: Path) -> int:
    """A run's rows as a table; exit status 0. Raises Refused."""
    require_writable(out)
    path = run / ROWS
    if not path.is_file():
        raise Refused(f"{run} has no {ROWS}")
    records = [row.model_dump() for row in RowFile(path)]
    write(records, out)
    print(f"{len(records):,} rows: {out}")
    return 0


def show(rows: Sequence[GeneratedRow], console: Console) -> None:
    """Each prompt once, its rows below it. No text of a model is markup, or moves the cursor."""
    last: str | None = None
    for row in rows:
        if row.prompt_id != last:
            console.print(Text(visible(row.prompt), "bold"))
            last = row.prompt_id
        console.print(Text(f"alpha {alpha_name(row.alpha)}, seed {row.seed}", "dim"))
        if row.failed:
            console.print(Text(f"failed: {visible(str(row.error))}", "red"))
        else:
            console.print(Text(visible(row.completion or "")))


def score(
    prompt: str,
    texts: Sequence[str],
    grid: Sequence[str],
    as_json: bool,
    client: dict[str, Any],
    fields: dict[str, Any],
) -> int:
    """Raises as LDAClient.score does."""
    alphas = numbers("--alpha", grid)
    with LDAClient(**client, api_key=os.environ.get(KEY)) as lda:
        scored = lda.score(prompt, texts, grid=alphas, **fields)
    if as_json:
        for text, one in zip(texts, scored, strict=True):
            print(json.dumps({"text": text, **one.model_dump()}, separators=(",", ":")))
        return 0
    table = Table(caption="log-probabilities of the whole continuation, in nats")
    table.add_column("continuation", overflow="fold")
    for heading in ("tokens", "after", "before", *(f"alpha {alpha_name(a)}" for a in alphas)):
        table.add_column(heading, justify="right")
    temperature = float(fields.get("temperature", 1.0))
    for text, one in zip(texts, scored, strict=True):
        sums = (sum(one.after), sum(one.before), *at_alphas(one, temperature))
        table.add_row(Text(visible(text)), str(len(one.token_ids)), *(f"{s:.3f}" for s in sums))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


def at_alphas(scored: Scored, temperature: float) -> list[float]:
    """The whole continuation's log-probability at each alpha of its grid."""

    def of(alpha: float, place: int) -> float:
        tokens = zip(scored.after, scored.before, scored.densities.normalisers, strict=True)
        return sum(
            ((1 + alpha) * after - alpha * before) / temperature - normalisers[place]
            for after, before, normalisers in tokens
        )

    return [of(alpha, place) for place, alpha in enumerate(scored.densities.alphas)]
