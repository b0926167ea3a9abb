#!/usr/bin/env bash
# The full comparison on one GPU, in about eight minutes: the 7B shape in bf16 through our backends and the peers that
# are installed, then the operations. Usage: bench/gpu_session.sh COMMIT FOLDER [models|ops|all]. COMMIT names this
# tree, for a copy without its history, and FOLDER receives the records and charts. What does not fit the budgets
# (seconds: COMPARE_S, OPS_S, LAYER_S, MATMUL_S) is skipped and says so. The environment changes what is run: DTYPE,
# BATCH, PREFILL, BACKENDS, PEERS.
set -uo pipefail
cd "$(dirname "$0")/.."
export JLLAMA_COMMIT=${1:?commit} XDG_CACHE_HOME=${XDG_CACHE_HOME:-/tmp/bench-cache}
out=${2:?folder}
part=${3:-all}
python=${PYTHON:-python3}
weights=/tmp/bench-weights
mkdir -p "$out" "$weights"
trap 'rm -rf "$weights"' EXIT

if [ "$part" != ops ]; then
  $python -m bench.compare --preset 7b --dtype "${DTYPE:-bf16}" --batch "${BATCH:-1}" --prompt-len 128 \
    --new-tokens 129 --prefill "${PREFILL:-2048}" --runs 5 --backends "${BACKENDS:-xla,auto}" \
    --peers "${PEERS:-torch-graph,hf-eager,hf-compile}" --time-limit 150 --budget "${COMPARE_S:-260}" \
    --cache-dir "$weights" --results "$out"
  echo "compare: exit $?"
fi
if [ "$part" != models ]; then
  ops="$python -m bench.ops --model 7b --dtype bf16 --time-limit 60 --results $out"
  $ops --op attention,decode-attention,ffn --seq 512,1024,2048,4096 --peers torch,cudnn,tokamax,jax-example \
    --budget "${OPS_S:-130}"
  echo "ops: exit $?"
  $ops --op layer --seq 512,2048 --backends xla,auto --peers torch --budget "${LAYER_S:-40}"
  echo "ops layer: exit $?"
  $ops --op matmul --seq 1,2048 --peers torch --budget "${MATMUL_S:-40}"
  echo "ops matmul: exit $?"
fi
