#!/usr/bin/env bash
# Usage: bash reports/gpu.sh PLAN DATA_DIR RUNS_DIR     (PYTHON names another interpreter), all on cifar10-jpeg; PLAN is
#   dmlp         SimCLR (ResNet-18, 32x32) once, then DMLP-Naive, the linear probe and cross-entropy at four noise rates
#   divide-mix   DivideMix, CPC_awr and DMLP-DivideMix at 90 % symmetric noise, then on human labels ("worse")
# Needs a CUDA device (DEVICE=cpu PRESET=smoke DATASET=digits TRUSTED=5 NOISES=symmetric:0.9 tries the script without one), torch,
# torchvision, numpy, pandas, scikit-learn and typer. Given again, it goes on where it stopped.
set -euo pipefail
plan=${1:?dmlp or divide-mix} data=${2:?where cifar10-jpeg is} runs=${3:?where runs go}
dataset=${DATASET:-cifar10-jpeg} device=${DEVICE:-cuda} python=${PYTHON:-python3}
case $plan in
    dmlp) methods="dmlp-naive linear-probe cross-entropy" noises="symmetric:0.9 symmetric:0.5 symmetric:0.8 symmetric:0.2" ;;
    divide-mix) methods="divide-mix cpc-awr dmlp-divide-mix" noises="symmetric:0.9 human:worse" ;;
    *) echo "PLAN = $plan; accepted: dmlp, divide-mix" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
lnl() { "$python" -m lnl_bench "$@"; }
"$python" -c "import sys, torch; torch.empty(0, device=sys.argv[1])" "$device"
for noise in ${NOISES:-$noises}; do
    for method in $methods; do
        lnl train "$method" --data "$dataset" --data-dir "$data" --noise "$noise" --trusted "${TRUSTED:-100}" --preset "${PRESET:-gpu}" --device "$device" \
            --runs-dir "$runs" --seed "${SEED:-0}"
    done
done
lnl report --runs-dir "$runs" --out reports/results.csv --records reports/runs
for run in "$runs"/cache/pretrain/*/; do # images per second and peak memory of the pre-training
    mkdir -p "reports/runs/$(basename "$run")"
    cp "$run"/{run.json,metrics.jsonl,clock.jsonl} "reports/runs/$(basename "$run")/"
done
