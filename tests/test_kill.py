"""A run killed with SIGKILL at a random moment and taken up again ends the same, to the last bit."""

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

COMMAND = ["train", "dmlp-naive", "--noise", "symmetric:0.8", "--preset", "smoke", "--set", "dmlp.epochs=12",
           "--set", "cross-entropy.epochs=6", "--set", "dmlp.feature_epochs=3", "--json"]  # fmt: skip


def lnl(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "lnl_bench", *arguments], env=environment, **options)


def finish(folder):
    process = lnl(*COMMAND, "--runs-dir", str(folder))
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    (run,) = [Run(p.parent) for p in folder.glob("*/run.json")]
    return run


def content(run):
    files = [run.path / name for name in ("metrics.jsonl", "labels.csv")]
    files += sorted((run.path / "snapshots").glob("*.npz"))
    return {f.name: f.read_bytes() for f in files}


def tensors(value, path=""):
    if isinstance(value, torch.Tensor): yield path, value
    elif isinstance(value, dict):
        for k, v in value.items(): yield from tensors(v, f"{path}/{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value): yield from tensors(v, f"{path}/{i}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    began = time.monotonic()
    run = finish(tmp_path_factory.mktemp("whole"))
    return run, time.monotonic() - began


@pytest.mark.timeout(400)
@pytest.mark.parametrize("attempt", range(3))
def test_killed_anywhere_and_resumed(attempt, uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    moments = []
    for _ in range(2):  # twice in one run: the second kill falls into a resumed run
        process = lnl(*COMMAND, "--runs-dir", str(tmp_path))
        moments.append(draw.uniform(0.1, 0.95) * seconds)
        time.sleep(moments[-1])
        if process.poll() is None: os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    run = finish(tmp_path)
    message = f"killed after {moments} s (seed {seed})"
    a, b = content(run), content(whole)
    assert a.keys() == b.keys(), message
    for name in a: assert a[name] == b[name], f"{name} differs; {message}"
    x, y = dict(tensors(load_checkpoint(run))), dict(tensors(load_checkpoint(whole)))
    assert x.keys() == y.keys(), message
    for name in x: assert torch.equal(x[name], y[name]), f"{name} differs; {message}"
