#!/usr/bin/env bash
# The comparisons on one GPU, in parts that each end within their seconds; what does not fit is skipped and says so.
#
#   bench/gpu_session.sh COMMIT FOLDER PART...
#     models  the 7B shape in bf16: our backends and the peers that are installed         MODELS_S (default 280)
#     quant   the same in int8 and int4, greedy and drawing: ours                         QUANT_S (default 130)
#     ops     attention, feed-forward, layer, products, beside other libraries'           OPS_S (default 170)
#     rows    1 to 256 rows in bf16: our engine, and vLLM                                 ROWS_S (default 430)
#     fp8     the same rows: vLLM in fp8                                                  FP8_S (default 180)
#     rows-quant  the same rows in int8 and int4: our engine                              ROWS_QUANT_S (default 340)
#     static  1, 8 and 64 rows without an engine: ours, plain PyTorch, HF compiled        STATIC_S (default 240)
#
# The first three fit one call of ten minutes, the last four two. These write no weights: every process makes its own, and
# no tokens of peers are checked. COMMIT names this tree, for a copy without its history. FOLDER receives the
# records; `python -m bench.report` makes tables and charts of them elsewhere. All parts of a call are one run: one
# machine, one after the other. The random weights stay in /tmp/bench-weights for the next call. The environment
# changes what is run: PRESET, BATCH, CONTEXT, PREFILL, NEW_TOKENS, RUNS, SHARE, PEERS, OPS, ITERATIONS, BACKENDS,
# VLLM_PYTHON (an interpreter that has vLLM).
set -uo pipefail
cd "$(dirname "$0")/.."
export JLLAMA_COMMIT=${1:?commit} JLLAMA_RUN=${JLLAMA_RUN:-$(date -u +%Y%m%d-%H%M%S)-gpu}
out=${2:?folder}
shift 2
python=${PYTHON:-python3}
mkdir -p "$out" /tmp/bench-weights

limited() { # SECONDS NAME COMMAND...: the command's own budget, and an end to it should it not keep to that
  local seconds=$1 name=$2 begin=$SECONDS
  shift 2
  timeout "$((seconds + 40))" "$python" -m "$@" --budget "$seconds" --results "$out" --plots -
  echo "$name: exit $?, $((SECONDS - begin)) s"
}
compare() {
  limited "$1" "$2" bench.compare --preset "${PRESET:-7b}" --prompt-len 128 --new-tokens "${NEW_TOKENS:-256}" \
    --runs "${RUNS:-5}" --time-limit 120 --order warm-together --cache-dir /tmp/bench-weights "${@:3}"
}
ops() {
  limited "$1" "$2" bench.ops --model "${PRESET:-7b}" --iterations "${ITERATIONS:-50}" --time-limit 60 "${@:3}"
}

for part in "${@:-models}"; do
  case $part in
    models)
      compare "${MODELS_S:-280}" models --dtype "${DTYPE:-bf16}" --batch "${BATCH:-1,8}" --context "${CONTEXT-4000}" \
        --prefill "${PREFILL-512,2048}" --backends "${BACKENDS:-pallas,xla}" --share "${SHARE:-35}" \
        --peers "${PEERS:-torch-graph,llama.cpp,hf-compile,hf-eager,vllm,sglang,tensorrt-llm,maxtext}"
      ;;
    quant)
      compare "${QUANT_S:-130}" quant --dtype int8,int4 --batch "${BATCH:-1,8}" --prefill "${PREFILL-512,2048}" \
        --backends "${BACKENDS:-pallas}" --peers none --sampled
      ;;
    ops)
      seconds=${OPS_S:-170}
      most=attention:512/1024/2048/4096/8192,decode-attention:1024/4096/8192,ffn:512/1024/2048/4096,layer:512/2048
      ops "$((seconds * 7 / 10))" ops --op "${OPS:-$most,matmul:1}" --backends "${BACKENDS:-pallas,xla}" \
        --peers torch,cudnn,tokamax
      ops "$((seconds * 15 / 100))" ops-quantised --op matmul:1 --dtype int8,int4 --backends pallas --peers none
      ops "$((seconds * 15 / 100))" ops-f16 --op attention:1024/4096/8192 --dtype f16 --backends pallas \
        --peers jax-example
      ;;
    rows)
      compare "${ROWS_S:-430}" rows --in-memory --dtype "${DTYPE:-bf16}" --batch "${BATCH:-1,8,64,128,256}" \
        --prefill "${PREFILL-512,2048}" --backends "${BACKENDS:-engine}" --peers "${PEERS:-vllm}" \
        --order one-by-one ${VLLM_PYTHON:+--peer-python "vllm=$VLLM_PYTHON"}
      ;;
    fp8)
      compare "${FP8_S:-180}" fp8 --in-memory --dtype bf16 --batch "${BATCH:-1,8,64,128,256}" --order one-by-one \
        --prefill "${PREFILL-512,2048}" --backends none --peers vllm-fp8 \
        ${VLLM_PYTHON:+--peer-python "vllm=$VLLM_PYTHON"}
      ;;
    rows-quant)
      compare "${ROWS_QUANT_S:-340}" rows-quant --in-memory --dtype int8,int4 --batch "${BATCH:-1,8,64,256}" \
        --order one-by-one \
        --prefill "${PREFILL-512,2048}" --backends "${BACKENDS:-engine}" --peers none
      ;;
    static)
      compare "${STATIC_S:-240}" static --in-memory --dtype "${DTYPE:-bf16}" --batch "${BATCH:-1,8,64}" \
        --prefill "${PREFILL-512,2048}" --backends "${BACKENDS:-pallas,xla}" --peers "${PEERS:-torch-graph,hf-compile}" \
        --share 60
      ;;
    *)
      echo "gpu_session.sh: expected models, quant, ops, rows, fp8, rows-quant or static, found $part" >&2
      exit 2
      ;;
  esac
done
