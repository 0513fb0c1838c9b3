"""The project's own rules: notebooks and library agree, notebooks are clean, and each check can fail."""

import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import check_notebooks as checks
import pytest

MODULE = "nbs/data/tiny.ipynb"
PAGE = "nbs/repro/repro_tiny.ipynb"


def code(id: str, source: str, **metadata) -> dict:
    return dict(cell_type="code", execution_count=None, id=id, metadata=metadata, outputs=[], source=source)


def write(path, cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = dict(display_name="python3", language="python", name="python3")
    nb = dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)
    for cell in cells: cell["source"] = cell["source"].splitlines(True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture
def project(repo, tmp_path):
    "A project of two notebooks with this project's settings, exported, without a fault."
    shutil.copyfile(repo / "settings.ini", tmp_path / "settings.ini")
    module = [code("a", "#| default_exp data.tiny"), code("b", "#| export\ndef one():\n    return 1\n")]
    write(tmp_path / MODULE, module)
    write(tmp_path / PAGE, [code("p", "noise: float = 0.4  # rate", tags=["parameters"]), code("q", "noise")])
    with tempfile.TemporaryDirectory() as target:
        shutil.copytree(checks.export_into(tmp_path, Path(target)), tmp_path / "lnl_bench")
    return tmp_path


def doctor(project, name, change):
    "Apply `change` to a notebook's content and write it back in nbdev's layout."
    path = project / name
    nb = json.loads(path.read_text(encoding="utf-8"))
    change(nb)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def only_fault(project, check) -> str:
    faults = checks.faults_of(project, [check])
    assert len(faults) == 1, faults
    return faults[0]


# --- this project ---


@pytest.mark.parametrize("check", checks.CHECKS)
def test_this_project_has_no_fault(repo, check):
    assert checks.faults_of(repo, [check]) == []


def test_ruff_is_clean(repo):
    command = [sys.executable, "-m", "ruff", "check", "lnl_bench", "tests", "setup.py"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_keep_the_parameters_tag(repo):
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(repo / "settings.ini")
    assert "tags" in cfg["DEFAULT"]["allowed_cell_metadata_keys"].split()


def test_lock_pins_every_requirement(repo):
    lines = [s for s in (repo / "requirements.lock").read_text().splitlines() if s and not s.startswith("#")]
    pinned = {s.split("==")[0].lower().replace("_", "-") for s in lines}
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(repo / "settings.ini")
    wanted = (cfg["DEFAULT"]["requirements"] + " " + cfg["DEFAULT"]["dev_requirements"]).split()
    names = {re.split("[<>=!~]", w)[0].lower().replace("_", "-") for w in wanted}
    assert all(s.count("==") == 1 and "/" not in s and "@" not in s for s in lines)
    assert names - pinned == set()


# --- each check can fail ---


def test_a_project_without_fault(project):
    assert checks.faults_of(project) == []


def test_edited_library_is_found_with_its_cell(project):
    path = project / "lnl_bench/data/tiny.py"
    path.write_text(path.read_text().replace("return 1", "return 2"))
    fault = only_fault(project, "export")
    assert "lnl_bench/data/tiny.py, line" in fault and "nbs/data/tiny.ipynb, cell b" in fault
    assert "return 1" in fault and "return 2" in fault


def test_edited_notebook_is_found_with_its_cell(project):
    doctor(project, MODULE, lambda nb: nb["cells"][1]["source"].append("\n# a new line"))
    assert "nbs/data/tiny.ipynb, cell b" in only_fault(project, "export")


def test_missing_and_stray_modules_are_found(project):
    (project / "lnl_bench/data/tiny.py").rename(project / "lnl_bench/data/old.py")
    missing, stray = sorted(checks.faults_of(project, ["export"]), key=lambda f: "old.py" in f)
    assert "tiny.py: missing" in missing and "old.py: no notebook exports it" in stray


def test_notebook_that_cannot_be_exported_is_named(project):
    (project / MODULE).write_text("{")
    with pytest.raises(RuntimeError, match="cannot be exported"): checks.check_export(project)


@pytest.mark.parametrize("change, says", [
    (lambda nb: nb["cells"][0].update(execution_count=3), "cleaning changes it (cells: a)"),
    (lambda nb: nb["cells"][1]["metadata"].update(collapsed=True), "cleaning changes it (cells: b)"),
    (lambda nb: nb["metadata"].update(language_info={}), "the notebook's own metadata"),
    (lambda nb: nb["metadata"].update(widgets={}), "widget state"),
    (lambda nb: nb["cells"][1].update(id="a"), "cell id 'a' stands 2 times"),
    (lambda nb: nb["cells"][1].pop("id"), "without an id"),
    (lambda nb: nb["cells"][1].update(source=["# " + "x" * 200_000]), "accepted: under 200,000"),
])  # fmt: skip
def test_unclean_notebooks_are_found(project, change, says):
    doctor(project, MODULE, change)
    fault = only_fault(project, "clean")
    assert fault.startswith(MODULE) and says in fault


def test_widget_view_in_an_output_is_found(project):
    view = dict(output_type="display_data", metadata={}, data={checks.WIDGET_OUTPUTS[0]: {"model_id": "x"}})
    doctor(project, PAGE, lambda nb: nb["cells"][1].update(outputs=[view]))
    assert "widget state" in only_fault(project, "clean")


@pytest.mark.parametrize("change, says", [
    (lambda nb: nb["cells"][0]["metadata"].clear(), "0 cells tagged"),
    (lambda nb: nb["cells"][1]["metadata"].update(tags=["parameters"]), "2 cells tagged"),
    (lambda nb: nb["cells"][0].update(cell_type="markdown"), "not a code cell"),
])  # fmt: skip
def test_lost_parameters_tag_is_found(project, change, says):
    doctor(project, PAGE, change)
    assert says in only_fault(project, "parameters")


def test_page_that_no_command_would_find_is_refused(project):
    (project / PAGE).rename(project / "nbs/repro/tiny.ipynb")
    assert "repro_*.ipynb" in only_fault(project, "parameters")


def test_outputs_are_found_where_code_is_read(project):
    output = dict(output_type="stream", name="stdout", text=["1\n"])
    doctor(project, PAGE, lambda nb: nb["cells"][1].update(outputs=[output]))
    assert checks.faults_of(project, ["outputs"]) == []
    doctor(project, MODULE, lambda nb: nb["cells"][1].update(outputs=[output]))
    fault = only_fault(project, "outputs")
    assert fault.startswith(f"{MODULE}: outputs in cells b")


# --- cleaning ---


def test_nbdev_clean_keeps_the_tag_and_takes_the_rest(project):
    original = (project / PAGE).read_text(encoding="utf-8")
    doctor(project, PAGE, lambda nb: nb["cells"][0]["metadata"].update(collapsed=True))
    doctor(project, PAGE, lambda nb: nb["cells"][0].update(execution_count=7))
    command = "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()"
    subprocess.run([sys.executable, "-c", command], cwd=project, check=True, capture_output=True)
    assert json.loads((project / PAGE).read_text())["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert (project / PAGE).read_text(encoding="utf-8") == original


def test_without_the_setting_cleaning_would_lose_the_tag(project):
    settings = project / "settings.ini"
    text = settings.read_text().replace("allowed_cell_metadata_keys = tags", "allowed_cell_metadata_keys =")
    settings.write_text(text)
    assert PAGE in only_fault(project, "clean")


def test_command_line_reports_and_fails(project):
    command = [sys.executable, checks.__file__, "--root", str(project)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (project / "lnl_bench/data/tiny.py").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lnl_bench/data/tiny.py: missing" in done.stdout and "1 fault(s)" in done.stdout
