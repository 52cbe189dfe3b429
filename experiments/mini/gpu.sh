#!/usr/bin/env bash
# The miniature at 100 M parameters, on one GPU: pretrains the base model, says what it can do, and makes the tables of it.
# After MINUTES, 8 unless said otherwise, nothing new is begun.
#
#     bash experiments/mini/gpu.sh OUTPUT
#
# OUTPUT gets results/, report/ and pretraining.txt; the records go to WORK, from where the same command goes on.
set -euo pipefail

output=$(realpath -m "${1:?"the folder to write is missing: bash experiments/mini/gpu.sh OUTPUT"}")
work=${WORK:-${TMPDIR:-/tmp}/miniature-gpu}
device=${DEVICE:-cuda}
began=$SECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$output" "$work"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

if [[ ! -f experiments/mini/models/qwen3.5-100m/config.json ]]; then
    python3 examples/miniature/pretrain.py qwen3.5-100m --device "$device" --steps "${STEPS:-1200}" \
        --minutes "${PRETRAIN_MINUTES:-2.5}" --problems 64 2> "$work/pretraining.err" | tee "$output/pretraining.txt" \
        || { tail -c 5000 "$work/pretraining.err"; exit 1; }
    if ! awk '/^pass@16:/ { able = ($2 + 0 >= 60) } END { exit !able }' "$output/pretraining.txt"; then
        echo "The base model solves too few problems to tune it: train it for longer, or at another rate." >&2
        rm -r experiments/mini/models/qwen3.5-100m
        exit 1
    fi
fi
echo "pretraining took $((SECONDS - began)) s"

# Half a minute is left to end what was begun, and for the report.
minutes=$(python3 -c "print(${MINUTES:-8} - 0.6 - ($SECONDS - $began) / 60)")
python3 experiments/mini/run.py --tables main-large alpha-large curve-large --device "$device" --dtype bfloat16 \
    --workers "${WORKERS:-8}" --minutes "$minutes" --output "$work" "${@:2}"
cp -r "$work/results" "$work/report" "$output/"
echo "all took $((SECONDS - began)) s"
