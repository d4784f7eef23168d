"""notebook.ipynb executed, with one cell more that keeps its rows for the comparison."""

import os
from pathlib import Path

import nbclient
import nbformat

out = Path(os.environ["LDA_RECIPE_OUT"])
notebook = nbformat.read(Path(__file__).with_name("notebook.ipynb"), as_version=4)
kept = f"rows.write_jsonl({str(out / 'rows.jsonl')!r}); rates.to_json({str(out / 'rates.json')!r})"
notebook.cells.append(nbformat.v4.new_code_cell(kept))
nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": out}}).execute()
nbformat.write(notebook, out / "notebook.ipynb")
