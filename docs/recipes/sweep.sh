# A small run of the job into $LDA_RECIPE_OUT/first, for what is done with a run's folder.
"$LDA_PYTHON" -m jobs.cli sweep --prompts prompts/tiny_demo.txt --limit 20 --alphas 0 0.5 2 \
    --max-new-tokens 24 --out "${1:-$LDA_RECIPE_OUT/first}"
