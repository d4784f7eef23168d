#!/bin/bash
# Runs a recipe against the shipped service: run.sh openai|inspect|lm_eval|schemathesis
#
# In the repository's root, with the project's own `python` first on the PATH (or PYTHON=...). The
# tool gets an environment of its own, $RECIPE_ENVS/NAME (default: .recipes/NAME), made once. The
# service is `serve run serve_config.yaml` on a free port; LDA_URL=... takes one that runs already.
# Afterwards the results are checked: compared with the same computed in this process, without a
# service.
set -euo pipefail
name=$1
here=docs/recipes
python=${PYTHON:-python}
env=${RECIPE_ENVS:-.recipes}/$name
out=${RECIPE_OUT:-$(mktemp -d)}
if [ ! -x "$env/bin/python" ]; then
    "$python" -m venv "$env"
    "$env/bin/pip" install -q -r "$here/$name.txt"
fi
PATH=$(cd "$env/bin" && pwd):$PATH
export PATH LDA_RECIPE_OUT=$out
if [ -n "${LDA_URL:-}" ]; then
    bash "$here/$name.sh"
else
    "$python" "$here/with_service.py" bash "$here/$name.sh"
fi
"$python" "$here/check_$name.py" "$out"
