# Three evaluations: alpha as a field of the body, in the model's name, and the model as it is.
set -euo pipefail
export LDA_BASE_URL=$LDA_URL/v1 LDA_API_KEY=none
export INSPECT_LOG_FORMAT=json INSPECT_DISPLAY=plain
task=docs/recipes/inspect_task.py
run() {
    out=$LDA_RECIPE_OUT/inspect/$1
    shift
    inspect eval "$task" --seed 5 --max-tokens 32 --log-dir "$out" "$@"
}
run field --model openai-api/lda/lda --extra-body '{"alpha": 2}'
run name --model openai-api/lda/lda:alpha=2
run after --model openai-api/lda/after
