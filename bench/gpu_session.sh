#!/usr/bin/env bash
# The full comparison on one GPU, in about eight minutes: the 7B shape in bf16 through our backends and the peers that
# are installed, then the operations. Usage: bench/gpu_session.sh COMMIT FOLDER, where COMMIT names this tree (a copy
# without its history cannot tell) and FOLDER receives the records and charts.
set -uo pipefail
cd "$(dirname "$0")/.."
export JLLAMA_COMMIT=${1:?commit} XDG_CACHE_HOME=${XDG_CACHE_HOME:-/tmp/bench-cache}
out=${2:?folder}
python=${PYTHON:-python3}
weights=/tmp/bench-weights
mkdir -p "$out" "$weights"

$python -m bench.compare --preset 7b --dtype bf16 --batch "${BATCH:-1,8}" --prompt-len 128 --new-tokens 129 \
  --prefill "${PREFILL:-512,2048}" --runs 5 --backends xla,pallas --peers torch-graph,hf-eager,hf-compile \
  --time-limit 150 --budget "${COMPARE_S:-280}" --cache-dir "$weights" --results "$out"
echo "compare: exit $?"
$python -m bench.ops --model 7b --op attention,decode-attention,ffn,layer --seq 512,1024,2048,4096 --dtype bf16 \
  --time-limit 60 --budget "${OPS_S:-130}" --results "$out"
echo "ops: exit $?"
$python -m bench.ops --model 7b --op matmul --seq 1,2048 --dtype bf16 --time-limit 60 --budget "${MATMUL_S:-50}" \
  --results "$out"
echo "ops matmul: exit $?"
rm -rf "$weights"
