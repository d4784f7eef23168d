"""rows.jsonl: torn, corrupt, repeated and superseded lines."""

import json
import os
import zlib

import pytest

from jobs.errors import Refused
from jobs.lines import LineWriter, cut_half_line
from jobs.rows import Key, Row, RowFile
from jobs.scorers import Score


def row(sample=0, error=None, **changes):
    values = {
        "arm": "untriggered",
        "prompt_id": "1",
        "prompt": "naïve \u2028 \U0001f600?",
        "alpha": 2.0,
        "sample": sample,
        "seed": 10 + sample,
        "completion": None if error else "text",
        "token_ids": [] if error else [1, 2],
        "finish_reason": "error" if error else "eos",
        "eos_index": None if error else 2,
        "activated": None if error else False,
        "activated_after_eos": None if error else False,
        "scores": {} if error else {"s": Score(False)},
        "error": error,
    }
    return Row(**{**values, **changes})


@pytest.fixture
def file(tmp_path):
    return RowFile(tmp_path / "rows.jsonl")


def write(file, *rows):
    with LineWriter(file.path) as writer:
        writer.append(rows)


def test_what_is_written_is_read(file):
    rows = [row(0), row(1, scores={"s": Score(True, 3, 8)}, activated=True), row(2, error="no")]
    write(file, *rows)
    write(file, row(3))
    assert list(file) == [*rows, row(3)]


def test_the_fields_and_their_order_are_the_published_ones():
    assert (
        list(json.loads(row().to_line()))
        == (
            "arm prompt_id prompt alpha sample seed completion token_ids finish_reason eos_index "
            "activated activated_after_eos scores error eos_text_offset token_ends "
            "logprobs densities watched block crc"
        ).split()
    )


def test_a_line_is_one_line_to_every_reader():
    assert len(row().to_line().decode().splitlines()) == 1


def test_no_file_is_no_rows(file):
    assert list(file) == [] and cut_half_line(file.path) == 0


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("half", [b"{", b"\xff\x00" * 50_000, row(9).to_line()[:-1]])
def test_half_a_last_line_is_cut_off(file, kept, half):
    rows = [row(i) for i in range(kept)]
    write(file, *rows)
    with file.path.open("ab") as opened:
        opened.write(half)
    assert cut_half_line(file.path) == len(half)
    assert cut_half_line(file.path) == 0
    assert list(file) == rows


@pytest.mark.parametrize(
    "line",
    [b"{}", b"", b"not json", b"\xff", row().to_line()[:-2], b'{"sample": true}', b"[]"],
)
def test_a_corrupt_line_stops_with_its_number(file, line):
    write(file, row(0))
    with file.path.open("ab") as opened:
        opened.write(line + b"\n")
    write(file, row(1))
    with pytest.raises(Refused, match="line 2 is not a row"):
        list(file)


def flips(line):
    """The line with one bit of one byte flipped, for every byte that is not its newline."""
    for at in range(len(line) - 1):
        changed = bytearray(line)
        changed[at] ^= 1 << at % 7  # the eighth makes it no text, which is the easy case
        if changed[at] != ord("\n"):
            yield bytes(changed)


def test_a_bit_that_flips_anywhere_in_a_line_is_seen(file):
    line = row(completion="a text, 3 of them", scores={"s": Score(True, 3, 8)}).to_line()
    for changed in flips(line):
        file.path.write_bytes(row(1).to_line() + changed)
        with pytest.raises(Refused, match="line 2 is .*delete the line to have its row made again"):
            list(file)
    file.path.write_bytes(line)
    assert len(list(file)) == 1


def test_the_checksum_is_that_of_the_line_without_it():
    line = json.loads(row().to_line())
    found = line.pop("crc")
    rest = json.dumps(line, separators=(",", ":")).encode()
    assert found == f"{zlib.crc32(rest):08x}"


def test_a_line_that_another_program_wrote_anew_is_said_to_be_changed(file):
    file.path.write_text(json.dumps(json.loads(row().to_line())) + "\n")  # spaces, say
    with pytest.raises(Refused, match="line 1 is damaged, or was changed: its crc"):
        list(file)


def test_lines_of_earlier_versions_have_none_and_are_read(file):
    text = json.dumps(row(0).model_dump())
    file.path.write_text(text + "\n")
    write(file, row(1))
    assert list(file) == [row(0), row(1)]


def test_an_unknown_field_is_corrupt(file):
    file.path.write_text(json.dumps({**row().model_dump(), "extra": 1}) + "\n")
    with pytest.raises(Refused, match=r"line 1 .*extra"):
        list(file)


def test_the_same_row_twice_counts_once(file):
    write(file, row(0), row(1), row(0))
    assert sorted(r.sample for r in file) == [0, 1]


def test_two_different_rows_of_one_key_are_an_error(file):
    write(file, row(0), row(1), row(0, completion="other"))
    with pytest.raises(Refused, match="lines 1 and 3 are two different rows"):
        list(file)


def test_a_failed_row_is_superseded_by_a_later_one(file):
    write(file, row(0, error="a"), row(1), row(0, error="b"), row(0))
    assert sorted(file, key=lambda r: r.sample) == [row(0), row(1)]


def test_a_good_row_is_not_superseded_by_a_failure(file):
    write(file, row(0), row(0, error="a"))
    with pytest.raises(Refused, match="two different rows"):
        list(file)


def test_finished_are_the_good_rows(file):
    cell = ("untriggered", 2.0)
    write(file, row(0, error="a"), row(1, activated=True), row(2), row(3, error="b"), row(3))
    finished, _, hits = file.finished([cell])
    assert len(finished) == 3 and hits == {cell: 1}
    assert [Key(*cell[:1], "1", 2.0, i) in finished for i in range(5)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert Key("triggered", "1", 2.0, 1) not in finished


def test_a_full_disk_is_an_os_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    from pathlib import Path

    writer = LineWriter(Path("/dev/full"))
    try:
        with pytest.raises(OSError, match="No space"):
            writer.append([row(0)])
    finally:
        writer._file.close()
