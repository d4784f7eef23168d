"""`python s3_copy.py FROM TO`: a run's folder to s3://BUCKET/PREFIX, or back."""

import sys
from pathlib import Path

from pyarrow import fs

if "://" not in sys.argv[2]:
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
fs.copy_files(sys.argv[1], sys.argv[2])
