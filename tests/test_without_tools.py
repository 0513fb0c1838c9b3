"""Training needs torch, torchvision, numpy, pandas and scikit-learn: the notebook tools are barred here."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
blocked = {"jupyterlab", "papermill", "plotly", "ipywidgets", "anywidget", "umap", "nbdev", "execnb",
           "fastcore", "IPython", "typer", "nbformat", "nbconvert", "ipykernel"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked: raise ImportError(f"{name} is blocked here", name=name)
sys.meta_path.insert(0, Blocker())
from lnl_bench.data.sources import digits
from lnl_bench.data.task import make_task
from lnl_bench.engine.train import train
from lnl_bench.methods.catalogue import configured
task = make_task(digits(), "symmetric:0.5", trusted_per_class=5, seed=0)
method = configured(sys.argv[1], task, "smoke")
run = train(method, task, runs_dir=sys.argv[2], preset="smoke", progress="off")
assert run.finished and not blocked & {m.partition(".")[0] for m in sys.modules}
print(run.result["label_accuracy_after"])
"""


@pytest.mark.parametrize("method", ["cross-entropy", "dmlp-naive"])
def test_trains_without_the_notebook_tools(method, tmp_path):
    command = [sys.executable, "-c", SCRIPT, method, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) <= 1
