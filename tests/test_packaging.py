"""What `pip install` gives: the wheel's contents and metadata, and syntax for every supported Python."""

import ast
import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

MINOR_VERSIONS = range(11, 16)


@pytest.fixture(scope="module")
def settings(repo):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(repo / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory):
    "A wheel built, offline, from a copy of the checkout."
    pytest.importorskip("setuptools", reason="building without the network needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("lnl_bench", "nbs", "tests"):
        skip = shutil.ignore_patterns("__pycache__", "runs", ".*")
        shutil.copytree(repo / name, source / name, ignore=skip)
    for path in repo.iterdir():
        if path.is_file(): shutil.copyfile(path, source / path.name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive: yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def squeezed(requirement: str) -> str:
    "A requirement without what its spelling may vary in: spaces, quotes, brackets, order of bounds."
    return requirement.lower().translate(str.maketrans("", "", " ()'\"")).replace("_", "-")


def test_metadata_is_that_of_settings_ini(metadata, settings):
    expected = dict(Name="lib_name", Version="version", Summary="description", Author="author")
    expected |= {"Author-email": "author_email", "Home-page": "git_url"}
    for field, key in expected.items(): assert metadata[field] == settings[key], field
    assert settings["license"] in (metadata["License"], metadata["License-Expression"])
    assert metadata["Requires-Python"] == f">={settings['min_python']}"
    assert metadata.get_all("Classifier") == settings["classifiers"].strip().splitlines()


def test_requirements_are_those_of_settings_ini(metadata, settings):
    found = {squeezed(r) for r in metadata.get_all("Requires-Dist")}
    expected = {squeezed(r) for r in settings["requirements"].split()}
    for extra in ("dev", *settings["extras"].split()):
        required = settings[f"{extra}_requirements"].split()
        expected |= {squeezed(f"{r}; extra == {extra}") for r in required}
    assert found == expected
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "ray", "cleanlab"}


def test_wheel_has_every_module_asset_and_page_and_nothing_else(wheel, repo):
    package = repo / "lnl_bench"
    expected = {p.relative_to(repo).as_posix() for p in package.rglob("*.py")}
    assets = (package / "assets").rglob("*")
    expected |= {p.relative_to(repo).as_posix() for p in assets if p.is_file()}
    pages = (repo / "nbs/repro").glob("repro_*.ipynb")
    expected |= {f"lnl_bench/notebooks/{p.name}" for p in pages}
    found = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert found == {n for n in expected if "__pycache__" not in n}


def test_shipped_pages_are_the_same_bytes(wheel, repo):
    for page in (repo / "nbs/repro").glob("repro_*.ipynb"):
        assert wheel.read(f"lnl_bench/notebooks/{page.name}") == page.read_bytes()


def test_wheel_has_licence_and_commands(wheel, settings):
    (entries,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    name, target = settings["console_scripts"].split("=")
    assert f"{name} = {target}" in wheel.read(entries).decode()
    assert any(n.endswith("/LICENSE") for n in wheel.namelist())


def test_version_is_that_of_settings_ini(repo, settings):
    assert f'__version__ = "{settings["version"]}"' in (repo / "lnl_bench/__init__.py").read_text()


def test_source_is_valid_for_the_oldest_python(repo):
    for path in sorted((repo / "lnl_bench").rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 11))


def interpreters() -> list[str]:
    "Other Pythons on this machine that really start; a version manager's shim may not."
    found = [shutil.which(f"python3.{minor}") for minor in MINOR_VERSIONS]
    starts = lambda exe: subprocess.run([exe, "-c", ""], capture_output=True).returncode == 0  # noqa: E731
    return [exe for exe in found if exe and starts(exe)]


@pytest.mark.parametrize("interpreter", interpreters())
def test_source_compiles_on_every_python_found(repo, tmp_path, interpreter):
    env = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [interpreter, "-W", "error", "-m", "compileall", "-q", "-f", str(repo / "lnl_bench")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
