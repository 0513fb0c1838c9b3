#!/usr/bin/env bash
# DivideMix, CPC_awr and DMLP-DivideMix on cifar10-jpeg: 90 % symmetric noise, then human labels ("worse").
# Usage: bash reports/gpu_divide_mix.sh DATA_DIR RUNS_DIR     (PYTHON names another interpreter)
# Needs a CUDA device (DEVICE=cpu PRESET=smoke DATASET=digits TRUSTED=5 NOISES=symmetric:0.9 tries the script without one), torch,
# torchvision, numpy, pandas, scikit-learn and typer. Given again, it goes on where it stopped.
set -euo pipefail
data=${1:?where cifar10-jpeg is} runs=${2:?where runs go} dataset=${DATASET:-cifar10-jpeg} device=${DEVICE:-cuda}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
lnl() { "$python" -m lnl_bench "$@"; }
"$python" -c "import sys, torch; torch.empty(0, device=sys.argv[1])" "$device"
for noise in ${NOISES:-symmetric:0.9 human:worse}; do
    for method in divide-mix cpc-awr dmlp-divide-mix; do
        lnl train "$method" --data "$dataset" --data-dir "$data" --noise "$noise" --trusted "${TRUSTED:-100}" --preset "${PRESET:-gpu}" --device "$device" \
            --runs-dir "$runs" --seed "${SEED:-0}"
    done
done
lnl report --runs-dir "$runs" --out reports/results.csv --records reports/runs
