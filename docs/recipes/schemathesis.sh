# What the server's own OpenAPI document allows, and what it does not: no answer may be a 5xx.
# One worker: CPython 3.11 cannot parse in several threads ("AST constructor recursion depth").
exec schemathesis run "$LDA_URL/openapi.json" --checks not_a_server_error --mode all \
    --phases examples,coverage,fuzzing --max-examples "${CASES:-20}" --seed 1 --workers 1 \
    --continue-on-failure --request-timeout 120 --no-color \
    --report json --report-json-path "$LDA_RECIPE_OUT/schemathesis.json"
