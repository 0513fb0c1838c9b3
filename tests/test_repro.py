"""The reproduction notebook, run in each way the README names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

SMOKE = ["-p", "preset", "smoke", "-p", "noise", "0.5"]


def run(*command, cwd, **options):
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 280, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=environment, **options)


def papermill(*arguments, cwd): return run(sys.executable, "-m", "papermill", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def notebook(repo): return repo / "nbs" / "repro" / "repro_dmlp.ipynb"


def left_results(folder):
    (table,) = (folder / "runs" / "repro").glob("dmlp-*/table.csv")
    return pd.read_csv(table, index_col=0)


@pytest.fixture(scope="module")
def executed(notebook, tmp_path_factory):
    "One run of the whole page at the smoke preset, through papermill with an output path."
    folder = tmp_path_factory.mktemp("papermill")
    done = papermill(notebook, folder / "out.ipynb", *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.timeout(300)
def test_papermill_with_an_output_path(executed):
    table = left_results(executed)
    rows = ["cross-entropy", "linear probe", "IPC alone", "EAC alone", "DMLP", "DMLP-Naive"]
    assert list(table.index) == rows
    assert table.loc["DMLP", "labels after"] > table.loc["DMLP", "labels before"] + 5
    labels = list((executed / "runs").glob("*dmlp-smoke*/labels.csv"))
    columns = {"index", "given", "corrected", "confidence", "p_clean"}
    assert labels and columns <= set(pd.read_csv(labels[0]).columns)


@pytest.mark.timeout(300)
def test_executed_notebook_shows_every_figure_statically(executed):
    page = nbformat.read(executed / "out.ipynb", as_version=4)
    outputs = [o for c in page.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    figures = [o for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(figures) == 6
    assert "widgets" not in page.metadata and (executed / "out.ipynb").stat().st_size < 400_000
    for figure in figures:
        layout = figure["data"]["application/vnd.plotly.v1+json"]["layout"]
        assert layout["title"]["text"]


@pytest.mark.timeout(300)
def test_papermill_piped_prints_the_notebook(notebook, tmp_path, executed):
    (tmp_path / "runs").mkdir()
    os.symlink(executed / "runs" / "cache", tmp_path / "runs" / "cache")
    source = notebook.read_bytes()
    done = papermill(notebook, *SMOKE, "-p", "method", "dmlp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["cells"]
    assert list(left_results(tmp_path).index) == ["IPC alone", "EAC alone", "DMLP"]
    assert notebook.read_bytes() == source


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name, value, words", [
    ("nosie", "0.9", ("'nosie'", "Did you mean 'noise'?")), ("noise", "1.7", ("1.7", "0 to 1")),
    ("epochs", "abc", ("'abc'", "int"))])
def test_papermill_with_a_bad_parameter_fails_before_any_work(name, value, words, notebook, tmp_path):
    done = papermill(notebook, tmp_path / "out.ipynb", "-p", name, value, cwd=tmp_path)
    assert done.returncode != 0
    for word in ("BadInput", *words): assert word in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
def test_short_form_prints_path_and_table_and_reuses_runs(notebook, executed):
    source = notebook.read_bytes()
    done = run(sys.executable, "-m", "lnl_bench", "repro", "dmlp", *SMOKE, cwd=executed)
    assert done.returncode == 0, done.stderr[-3000:]
    path = Path(done.stdout.strip().splitlines()[-1].removeprefix("executed notebook: "))
    assert (executed / path).is_file() and path.name == "repro_dmlp.ipynb" and "DMLP-Naive" in done.stdout
    assert notebook.read_bytes() == source
    assert "1/" not in done.stderr, "everything had been trained already; nothing is trained again"


def test_never_overwrites_the_source(notebook, tmp_path):
    done = run(sys.executable, "-m", "lnl_bench", "repro", "dmlp", "--out-dir", notebook.parent, cwd=tmp_path)
    assert done.returncode == 2 and "holds the source notebooks" in done.stderr


def test_parameters_cell_matches_the_library(notebook):
    "The defaults that a reader sees are those that the library declares."
    from lnl_bench.repro.experiment import Parameters
    page = nbformat.read(notebook, as_version=4)
    (cell,) = [c for c in page.cells if "parameters" in c.metadata.get("tags", [])]
    namespace: dict = {}
    exec(cell.source, namespace)
    shown = {k: v for k, v in namespace.items() if not k.startswith("_")}
    assert Parameters() == Parameters(**shown)


# --- CPC, Table 3 ---


@pytest.mark.timeout(300)
def test_cleaners_page_shows_what_its_runs_recorded(repo, tmp_path):
    page = repo / "nbs" / "repro" / "repro_cpc_t3.ipynb"
    done = papermill(page, tmp_path / "out.ipynb", "-p", "preset", "smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "runs" / "repro").glob("cpc_t3-*/table.csv")
    table = pd.read_csv(file, index_col=0)
    assert list(table.index) == ["gmm-agn", "gmm-awr", "cpc-agn", "cpc-awr"] and (table["n"] == 1).all()
    for method, row in table.iterrows():
        (result,) = (tmp_path / "runs").glob(f"*-{method}-smoke-*/result.json")
        kept = json.loads(result.read_text())
        assert row["AUC at the end (× 100)"] == round(100 * kept["noise_detection"]["auc"], 1)
        assert row["test last"] == round(100 * kept["last"], 1)
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs) == 2


def test_cleaners_page_refuses_bad_seeds_before_any_work(repo, tmp_path):
    page = repo / "nbs" / "repro" / "repro_cpc_t3.ipynb"
    done = papermill(page, tmp_path / "out.ipynb", "-p", "seeds", "0", cwd=tmp_path)
    assert done.returncode != 0 and "seeds = 0" in done.stderr and not (tmp_path / "runs").exists()
