#!/usr/bin/env bash
# The whole test run, as `make test` starts it:  tests/run.sh BIN [pytest arguments]
# All three steps run even if one fails, so that one run shows everything; pytest's closing line comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$1
shift
case $bin in /*) ;; *) bin=$PWD/$bin ;; esac
workers=${WORKERS:-2}
# Several processes at once, one thread each: more threads than cores make every one of them slower.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 PYTHONUNBUFFERED=1
export PATH="$bin:$PATH"
failed=()

step() { # name, then a command
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    "$@" || failed+=("$name (exit status $?)")
    printf -- '--- %s: %d s\n' "$name" $((SECONDS - start))
}

pages() { # every notebook but the pages that papermill runs; a notebook has a minute, all of them 20
    timeout 1200 "$bin/nbdev_test" --n_workers "$workers" --timing --skip_file_re '^([_.]|repro_)'
}

step "notebooks and library agree" "$bin/python" tests/check_notebooks.py
step "notebooks run" pages
if ((${#failed[@]})); then printf '\nFAILED so far: %s\n' "${failed[*]}"; fi

printf '\n=== pytest\n'
# loadgroup: tests of one xdist_group, such as those with a browser, run in one worker after another.
"$bin/python" -m pytest -n "$workers" --dist loadgroup --durations 10 "$@" || failed+=("pytest")

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[*]}" >&2
    exit 1
fi
