"""check_s3.py FOLDER: what came back from the bucket is what was there, and the job took it."""

import sys
from pathlib import Path

from in_process import same

out = Path(sys.argv[1])


def content(folder: str) -> dict[str, bytes]:
    files = [path for path in (out / folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(out / folder).as_posix(): path.read_bytes() for path in files}


first = content("first")
same("a whole run", {"rows.jsonl", "summary.json", "report.html"} <= first.keys(), True)
same("by pyarrow", content("by_copy") == first, True)
back = content("by_sync")
same("by aws s3 sync", back.keys(), first.keys())
for name in ("rows.jsonl", "summary.json", "manifest.json"):  # nothing was sampled again
    same(name, back[name] == first[name], True)
print(f"s3: {len(first)} files the same after both ways, and the run resumed from them")
