# A run of the job, to a bucket and back in both ways; what came back goes on. The bucket is moto's.
set -euo pipefail
bash docs/recipes/sweep.sh
cd "$LDA_RECIPE_OUT"
moto_server -H 127.0.0.1 -p 0 >moto.log 2>&1 &
moto=$!
trap 'kill $moto' EXIT
until grep -q 'Running on' moto.log; do
    kill -0 $moto
    sleep 0.2
done
export AWS_ENDPOINT_URL=$(sed -n 's/.*Running on //p' moto.log) AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
export AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null
python -m awscli s3 mb s3://lda

python -m awscli s3 sync first s3://lda/first --exclude .lock
python -m awscli s3 sync s3://lda/first by_sync

python "$OLDPWD/docs/recipes/s3_copy.py" "$PWD/first" s3://lda/again
python "$OLDPWD/docs/recipes/s3_copy.py" s3://lda/again "$PWD/by_copy"

cd "$OLDPWD"
bash docs/recipes/sweep.sh "$LDA_RECIPE_OUT/by_sync" | tee "$LDA_RECIPE_OUT/resumed.txt"
