#!/usr/bin/env bash
# SimCLR (ResNet-18, 32x32) once, then cross-entropy, the linear probe and DMLP-Naive on cifar10-jpeg at four noise rates.
# Usage: bash reports/gpu_dmlp.sh DATA_DIR RUNS_DIR     (PYTHON names another interpreter)
# Needs a CUDA device (DEVICE=cpu PRESET=smoke DATASET=digits TRUSTED=5 tries the script without one), torch, torchvision, numpy,
# pandas, scikit-learn and typer. Given again, it goes on where it stopped.
set -euo pipefail
data=${1:?where cifar10-jpeg is} runs=${2:?where runs go} dataset=${DATASET:-cifar10-jpeg} device=${DEVICE:-cuda}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
lnl() { "$python" -m lnl_bench "$@"; }
"$python" -c "import sys, torch; torch.empty(0, device=sys.argv[1])" "$device"
for noise in 0.9 0.5 0.8 0.2; do
    for method in dmlp-naive linear-probe cross-entropy; do
        lnl train "$method" --data "$dataset" --data-dir "$data" --noise "symmetric:$noise" --trusted "${TRUSTED:-100}" --preset "${PRESET:-gpu}" --device "$device" \
            --runs-dir "$runs" --seed "${SEED:-0}"
    done
done
lnl report --runs-dir "$runs" --out reports/results.csv --records reports/runs
for run in "$runs"/cache/pretrain/*/; do # images per second and peak memory of the pre-training
    mkdir -p "reports/runs/$(basename "$run")"
    cp "$run"/{run.json,metrics.jsonl,clock.jsonl} "reports/runs/$(basename "$run")/"
done
