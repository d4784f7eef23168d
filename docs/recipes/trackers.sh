# A run of the job into both trackers, neither of which needs a server here.
set -euo pipefail
bash docs/recipes/sweep.sh
run=$LDA_RECIPE_OUT/first
export MLFLOW_TRACKING_URI=sqlite:///$LDA_RECIPE_OUT/mlflow.db MLFLOW_DISABLE_TELEMETRY=true
recipes=$PWD/docs/recipes
cd "$LDA_RECIPE_OUT" # where MLflow puts its artifacts, W&B its runs
python "$recipes/track_mlflow.py" "$run"
WANDB_MODE=offline python "$recipes/track_wandb.py" "$run"
python "$recipes/tracked.py" # what both hold now, as tracked.json
