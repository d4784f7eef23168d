#!/bin/bash
# Runs a recipe against the shipped service:
#     docs/recipes/run.sh openai|inspect|lm_eval|schemathesis|notebook|trackers|s3
#
# In the repository's root, with the project's own `python` first on the PATH (or PYTHON=...). The
# tool gets an environment of its own, $RECIPE_ENVS/NAME (default: .recipes/NAME), made once. The
# service is `serve run serve_config.yaml` on a free port; LDA_URL=... (and, where a job is run,
# RAY_ADDRESS=...) takes one that runs already.
# Afterwards the results are checked: compared with the same computed in this process, without a
# service.
set -euo pipefail
name=$1
here=docs/recipes
python=${PYTHON:-python}
env=${RECIPE_ENVS:-.recipes}/$name
out=$(cd "${RECIPE_OUT:-$(mktemp -d)}" && pwd)
if [ ! -x "$env/bin/python" ]; then
    "$python" -m venv "$env"
    "$env/bin/pip" install -q -r "$here/$name.txt"
fi
LDA_PYTHON=$(command -v "$python")
PATH=$(cd "$env/bin" && pwd):$PATH
export PATH LDA_PYTHON LDA_RECIPE_OUT=$out
if [ -n "${LDA_URL:-}" ]; then
    bash "$here/$name.sh"
else
    "$LDA_PYTHON" "$here/with_service.py" bash "$here/$name.sh"
fi
"$LDA_PYTHON" "$here/check_$name.py" "$out"
