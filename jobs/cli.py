"""The `lda` command: a thin door to everything that is here.

What a command needs is imported when it is called, so that `lda --help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from jobs.cli_jobs import DOORS, Door, run_job

app = typer.Typer(
    name="lda",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Logit diff amplification: serve a pair of models, sample it amplified, find out what
the fine-tune hid.

\b
Begin with the tiny pair that is shipped:
  lda serve
and in another shell:
  lda generate "What is the capital of France?" --format alpaca --alpha 0,2 -n 4
  lda sweep --prompts "$(lda files prompts/tiny_demo.txt)" --limit 100 --out results/first
""",
)

Url = Annotated[str, typer.Option(envvar="LDA_URL", help="Of the service; its key: LDA_API_KEY.")]
Format = Annotated[
    Literal["raw", "alpaca", "chat"] | None,
    typer.Option("--format", help="How the prompt is put to the models (default: raw)."),
]
SystemPrompt = Annotated[str | None, typer.Option(help="With alpaca or chat.", metavar="TEXT")]
Json = Annotated[bool, typer.Option("--json", help="A line of JSON for each.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other field of the request; may come again."
    ),
]


@app.command(
    epilog="""\b
Examples:
  lda serve                        the tiny pair, on http://127.0.0.1:8000
  lda serve my_pair.yaml --port 8001
"""
)
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Of Ray Serve; default: the tiny pair that is shipped.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the file's, or 8000.")
    ] = None,
) -> None:
    """Serve a pair, in the foreground.

    On this machine only, as a Ray cluster of its own; Ctrl-C stops it."""
    from jobs.cli_generate import status_of
    from jobs.cli_serve import serve

    raise typer.Exit(status_of(lambda: serve(config, port)))


@app.command(
    epilog="""\b
Examples:
  lda generate "What is the capital of France?" --format alpaca --alpha 2 -n 4
  lda generate --prompts questions.csv --column question --alpha 0,1,2 --out rows.parquet
  lda generate "Hi" --set 'steer={"trait": "payload", "layer": 1, "coefficient": 4}' --json
"""
)
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=".txt, .jsonl, .csv, .parquet, or hf:NAME[@SPLIT]."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a table (default: prompt).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(metavar="A[,A]...", help="One or several (default: 1); may come again."),
    ] = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Of each.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: picked, and said.")] = None,
    prompt_format: Format = None,
    system_prompt: SystemPrompt = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 80,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Of every token, under each model.")
    ] = False,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write .jsonl, .csv or .parquet instead.")
    ] = None,
    as_json: Json = False,
    url: Url = "http://127.0.0.1:8000",
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 64,
) -> None:
    """Sample prompts, amplified.

    From a running service. Keeps all rows until the end: a run of hours is for `lda sweep`, which
    resumes."""
    from jobs import cli_generate as job

    def run() -> int:
        fields: dict[str, Any] = {
            "n": samples,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": logprobs,
            **_given(prompt_format=prompt_format, system_prompt=system_prompt),
            **job.more_fields(settings or []),
        }
        client = {"url": url, "in_flight": in_flight}
        alphas = alpha or ["1"]
        return job.generate(
            prompt or [], prompts, column, limit, alphas, out, as_json, client, fields
        )

    raise typer.Exit(job.status_of(run))


@app.command(
    epilog="""\b
Example:
  lda score "What is the capital of France?" --format alpaca --text Paris. --text Rome. --alpha 0,2
"""
)
def score(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    text: Annotated[list[str], typer.Option(help="A continuation; may come again.")],
    alpha: Annotated[
        list[str] | None, typer.Option(metavar="A[,A]...", help="One or several (default: 0,1).")
    ] = None,
    prompt_format: Format = None,
    system_prompt: SystemPrompt = None,
    temperature: Annotated[float, typer.Option()] = 1.0,
    settings: Settings = None,
    as_json: Json = False,
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """How likely are given continuations?

    Under both models, and amplified."""
    from jobs import cli_generate as job

    def run() -> int:
        fields = {
            "temperature": temperature,
            **_given(prompt_format=prompt_format, system_prompt=system_prompt),
            **job.more_fields(settings or []),
        }
        return job.score(prompt, text, alpha or ["0,1"], as_json, {"url": url}, fields)

    raise typer.Exit(job.status_of(run))


class _AsTyped(TyperCommand):
    """Reads nothing itself, --help included: the job's own parser does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = args
        return args


def _open(door: Door) -> None:
    def run(context: typer.Context) -> None:
        raise typer.Exit(run_job(door, context.args))

    app.command(door.name, cls=_AsTyped, help=door.help)(run)


for _door in DOORS:
    _open(_door)


@app.command()
def rows(
    run: Annotated[Path, typer.Argument(help="A run's folder (the --out of `lda sweep`).")],
    out: Annotated[Path, typer.Option(metavar="FILE", help=".parquet, .csv or .jsonl.")],
) -> None:
    """Write a run's rows as a table.

    Parquet, CSV or JSONL; a line for each sample, the last of those that were made again."""
    from jobs import cli_generate as job

    raise typer.Exit(job.status_of(lambda: job.write_run(run, out)))


@app.command()
def prompts(
    source: Annotated[str, typer.Argument(help=".txt, .jsonl, .csv, .parquet, hf:NAME[@SPLIT].")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl")],
    column: Annotated[str | None, typer.Option(metavar="NAME", help="Default: prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
) -> None:
    """Turn prompts into .jsonl, for the jobs.

    Checked, from any of the kinds that `lda generate` reads."""
    from jobs.cli_generate import status_of
    from jobs.prompt_sources import write_prompts

    raise typer.Exit(status_of(lambda: write_prompts(source, column, limit, out)))


@app.command()
def files(name: Annotated[str | None, typer.Argument(help="Default: list them.")] = None) -> None:
    """Where a shipped file lies.

    Prompts, traits and configurations that come with the package."""
    from jobs.cli_files import names, shipped
    from jobs.cli_generate import status_of

    def run() -> int:
        print(shipped(name) if name else "\n".join(names()))
        return 0

    raise typer.Exit(status_of(run))


@app.command()
def version() -> None:
    """The version.

    And the commit, where it is a checkout."""
    from importlib.metadata import version

    from deployments.commit import commit

    found = commit()
    print(f"lda-serve {version('lda-serve')}" + (f" ({found})" if found else ""))


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def main() -> None:
    app()


if __name__ == "__main__":
    main()
