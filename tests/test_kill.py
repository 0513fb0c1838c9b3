"""A run killed with SIGKILL at a random moment and taken up again ends the same, to the last bit."""

import functools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from lnl_bench.engine.runs import Run
from lnl_bench.engine.train import load_checkpoint

# With two networks: two epochs of warm-up, then three whose losses are remembered. One kill falls around the
# end of warm-up, one where only a checkpoint knows what is remembered; much later it could come too late.
PAIR = "--noise symmetric:0.5 --data digits[300] --set epochs=5 --set warmup=2 --set average=3"
ARGUMENTS = {
    "dmlp-naive": "--noise symmetric:0.8 --set dmlp.epochs=12 --set cross-entropy.epochs=6 "
                  "--set dmlp.feature_epochs=3",
    "divide-mix": PAIR,
    "cpc": PAIR,
}
NETWORKS = ("nets/weights/0.", "nets/weights/1.", "optimiser1/state", "optimiser2/state",
            "history", "p_clean")
KEPT = {"dmlp-naive": ("net/weights", "optimiser/state"), "divide-mix": NETWORKS,
        "cpc": (*NETWORKS, "cleaners/weights", "teacher1/state", "teacher2/state", "believed", "score")}
ATTEMPTS = [("dmlp-naive", 0), ("dmlp-naive", 1), ("dmlp-naive", 2), ("divide-mix", 0), ("cpc", 0)]


def start(method, folder):
    command = [sys.executable, "-m", "lnl_bench", "train", method, *ARGUMENTS[method].split(),
               "--preset", "smoke", "--json", "--runs-dir", str(folder)]  # fmt: skip
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(method, folder):
    process = start(method, folder)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    (run,) = [Run(p.parent) for p in folder.glob("*/run.json")]
    return run


def moments(method, whole, seconds, draw):
    "Two kills, each the epochs to wait for and the seconds after them: the second falls into a resumed run."
    if method == "dmlp-naive": return [(0, draw.uniform(0.1, 0.95) * seconds) for _ in range(2)]
    lasted = [row["seconds"] for row in whole.clock.read()[0]]
    return [(e, draw.uniform(0, 0.8) * lasted[e]) for e in (draw.randint(1, 2), 3)]


def kill(method, folder, epochs, seconds):
    "Start or resume a run and kill it that many seconds after it has recorded that many epochs in all."
    process = start(method, folder)
    while process.poll() is None:
        if sum(p.read_text().count("\n") for p in folder.glob("*/metrics.jsonl")) >= epochs: break
        time.sleep(0.02)
    time.sleep(seconds)
    if process.poll() is None: os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode


def content(run):
    files = [run.path / name for name in ("metrics.jsonl", "labels.csv")]
    files += sorted((run.path / "snapshots").glob("*.npz"))
    return {f.name: f.read_bytes() for f in files}


def leaves(value, path=""):
    if isinstance(value, dict):
        for k, v in value.items(): yield from leaves(v, f"{path}/{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value): yield from leaves(v, f"{path}/{i}")
    else: yield path, value


def state(run):
    "Every tensor and number of the last checkpoint, but how long the file of measured times is."
    found = dict(leaves(load_checkpoint(run)))
    del found["/clock"]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "For the name of a method its run without a kill, made once, and how many seconds that took."
    @functools.cache
    def get(method):
        began = time.monotonic()
        run = finish(method, tmp_path_factory.mktemp("whole"))
        return run, time.monotonic() - began

    return get


@pytest.mark.timeout(400)
@pytest.mark.parametrize("method, attempt", ATTEMPTS)
def test_killed_anywhere_and_resumed(method, attempt, uninterrupted, tmp_path):
    whole, seconds = uninterrupted(method)
    seed = random.SystemRandom().randrange(2**32)
    plan = moments(method, whole, seconds, random.Random(seed))
    ends = [kill(method, tmp_path, *moment) for moment in plan]
    run = finish(method, tmp_path)
    message = f"killed after (epochs, seconds) {plan} with exit statuses {ends} (seed {seed})"
    if method != "dmlp-naive": assert ends == [-signal.SIGKILL] * 2, message
    a, b = content(run), content(whole)
    assert a.keys() == b.keys(), message
    for name in a: assert a[name] == b[name], f"{name} differs; {message}"
    x, y = state(run), state(whole)
    assert x.keys() == y.keys(), message
    for name in x: assert same(x[name], y[name]), f"{name} differs; {message}"
    for part in KEPT[method]: assert any(name.startswith(f"/stage/{part}") for name in x), f"no {part}"
