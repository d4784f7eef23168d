"""`python s3_copy.py FROM TO`: a run's folder to s3://BUCKET/PREFIX, or back."""

import sys

from pyarrow import fs

fs.copy_files(sys.argv[1], sys.argv[2])
