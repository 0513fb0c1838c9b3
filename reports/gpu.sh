#!/usr/bin/env bash
# Usage: bash reports/gpu.sh PLAN DATA_DIR RUNS_DIR     (PYTHON names another interpreter), all on cifar10-jpeg; PLAN is
#   dmlp         SimCLR (ResNet-18, 32x32) once, then DMLP-Naive, the linear probe and cross-entropy at four noise rates
#   divide-mix   DivideMix, CPC_awr and DMLP-DivideMix at 90 % symmetric noise, then on human labels ("worse")
#   meta         the bench of meta-gradients at full width; MW-Net with each engine, with FaMUS, FaMUS of two networks, and IEG at 40 % symmetric noise
# Needs a CUDA device (DEVICE=cpu PRESET=smoke DATASET=digits TRUSTED=5 NOISES=symmetric:0.9 tries the script without one), torch,
# torchvision, numpy, pandas, scikit-learn and typer. Given again, it goes on where it stopped.
set -euo pipefail
plan=${1:?dmlp, divide-mix or meta} data=${2:?where cifar10-jpeg is} runs=${3:?where runs go}
dataset=${DATASET:-cifar10-jpeg} device=${DEVICE:-cuda} python=${PYTHON:-python3}
case $plan in
    dmlp) methods="dmlp-naive linear-probe cross-entropy" noises="symmetric:0.9 symmetric:0.5 symmetric:0.8 symmetric:0.2" ;;
    divide-mix) methods="divide-mix cpc-awr dmlp-divide-mix" noises="symmetric:0.9 human:worse" ;;
    meta) methods="mw-net famus-mw-net famus ieg mw-net:engine=difference mw-net:engine=reverse" noises="symmetric:0.4" ;;
    *) echo "PLAN = $plan; accepted: dmlp, divide-mix, meta" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
lnl() { "$python" -m lnl_bench "$@"; }
"$python" -c "import sys, torch; torch.empty(0, device=sys.argv[1])" "$device"
if [ "$plan" = meta ]; then
    lnl bench metagrad --set nets="${NETS:-preact-resnet18,wrn-28-10}" --set device="$device" --json >"$runs-bench.json"
    mv "$runs-bench.json" reports/bench_metagrad_"${device%%:*}".json
fi
for noise in ${NOISES:-$noises}; do
    for entry in $methods; do # a method, or method:setting=value
        own=()
        case $entry in *:*) own=(--set "${entry#*:}") ;; esac
        lnl train "${entry%%:*}" ${own[@]+"${own[@]}"} --data "$dataset" --data-dir "$data" --noise "$noise" \
            --trusted "${TRUSTED:-100}" --preset "${PRESET:-gpu}" --device "$device" --runs-dir "$runs" --seed "${SEED:-0}"
    done
done
lnl report --runs-dir "$runs" --out reports/results.csv --records reports/runs
for run in "$runs"/cache/pretrain/*/; do # images per second and peak memory of the pre-training
    [ -d "$run" ] || continue
    mkdir -p "reports/runs/$(basename "$run")"
    cp "$run"/{run.json,metrics.jsonl,clock.jsonl} "reports/runs/$(basename "$run")/"
done
