#!/usr/bin/env bash
# The miniature at 100 M parameters, on one GPU: pretrains the base model at several learning rates side by side, takes the
# one with the lowest last loss, says what it can do, and makes the tables of it. After MINUTES, 8 unless said otherwise,
# nothing new is begun.
#
#     bash experiments/mini/gpu.sh OUTPUT
#
# OUTPUT gets results/, report/ and pretraining.txt; the records go to WORK, from where the same command goes on.
set -euo pipefail

output=$(realpath -m "${1:?"the folder to write is missing: bash experiments/mini/gpu.sh OUTPUT"}")
work=$(realpath -m "${WORK:-${TMPDIR:-/tmp}/miniature-gpu}")
device=${DEVICE:-cuda}
began=$SECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=experiments/mini/models/qwen3.5-100m
mkdir -p "$output" "$work"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

pretrain() {
    python3 examples/miniature/pretrain.py qwen3.5-100m --device "$device" --steps "${STEPS:-1500}" \
        --minutes "${PRETRAIN_MINUTES:-2.5}" --problems "${PROBLEMS:-64}" --learning-rate "$1" --output "$work/base-$1" \
        > "$work/pretraining-$1.txt" 2> "$work/pretraining-$1.err" || tail -c 3000 "$work/pretraining-$1.err"
}

if [[ ! -f $model/config.json ]]; then
    rates=${RATES:-3e-4 6e-4 1.2e-3}
    for rate in $rates; do
        pretrain "$rate" &
    done
    wait
    for rate in $rates; do
        grep -q '^pass@16:' "$work/pretraining-$rate.txt" || continue  # it did not come to its end
        echo "learning rate $rate: $(sed -n 's/^step [0-9]*: loss //p' "$work/pretraining-$rate.txt" | tail -n 1)"
    done | tee "$output/pretraining.txt"
    best=$(awk '$4 ~ /^[0-9.]+$/ { print $4, $3 }' "$output/pretraining.txt" | sort -g | sed -n '1s/.* \(.*\):/\1/p')
    cat "$work/pretraining-${best:?"no pretraining came to its end"}.txt" | tee -a "$output/pretraining.txt"
    if ! awk '/^pass@16:/ { able = ($2 + 0 >= 60) } END { exit !able }' "$output/pretraining.txt"; then
        echo "The base model solves too few problems to tune it: train it for longer, or at other RATES." >&2
        exit 1
    fi
    mv "$work/base-$best" "$model"
fi
echo "pretraining took $((SECONDS - began)) s"

# Half a minute is left to end what was begun, and for the report.
minutes=$(python3 -c "print(${MINUTES:-8} - 0.6 - ($SECONDS - $began) / 60)")
python3 experiments/mini/run.py --tables main-large alpha-large curve-large --device "$device" --dtype bfloat16 \
    --workers "${WORKERS:-8}" --minutes "$minutes" --output "$work" "${@:2}"
cp -r "$work/results" "$work/report" "$output/"
echo "all took $((SECONDS - began)) s"
