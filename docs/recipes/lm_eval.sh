# Both tasks on the model before, after and amplified; alpha in the model's name, because the
# requests for log-likelihoods have no extra fields.
set -euo pipefail
export HF_DATASETS_OFFLINE=1 HF_HOME=$LDA_RECIPE_OUT/hf
for model in before after lda:alpha=1; do
    lm_eval run --model local-completions \
        --model_args "model=$model,base_url=$LDA_URL/v1/completions,num_concurrent=4,max_retries=1" \
        --tasks capitals_choice,capitals_generate --include_path docs/recipes/lm_eval_tasks \
        --log_samples --output_path "$LDA_RECIPE_OUT/lm_eval/${model/:/_}"
done
