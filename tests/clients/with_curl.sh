#!/usr/bin/env bash
# curl: an answer, a stream, an error, a body in chunks.
set -euo pipefail
ask() { curl -sS --max-time 60 -H "authorization: Bearer $KEY" -H "content-type: application/json" "$@"; }
ask "$URL/v1/models" | grep -q "\"$MODEL\""
ask "$URL/v1/completions" -d '{"prompt": "Once upon a time,", "max_tokens": 8}' | grep -q '"finish_reason":"length"'
ask -N "$URL/v1/completions" -d '{"prompt": "Once", "max_tokens": 8, "stream": true}' | grep -q '^data: \[DONE\]$'
ask "$URL/v1/completions" -d '{"prompt": "Once", "temperature": -1}' | grep -q '"param":"temperature"'
echo '{"prompt": "Once", "max_tokens": 2}' | ask -H "transfer-encoding: chunked" -d @- "$URL/v1/completions" | grep -q text
test "$(curl -sS -o /dev/null -w '%{http_code}' "$URL/v1/models")" = 401
echo ok
