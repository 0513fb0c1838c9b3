"""What every test shares: few threads, a cache of its own, and the optional data beside the checkout."""

import os
from pathlib import Path

import browser
import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    # Before torch is imported anywhere: parallel workers with a thread per core each slow one another down.
    if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    "Tests marked `gpu` are skipped, not failed, on a machine without one."
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked: return
    import torch

    if torch.cuda.is_available(): return
    for item in marked: item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="session")
def repo() -> Path:
    "The root of the checkout."
    return ROOT


@pytest.fixture(scope="session")
def shared_data(repo) -> Path:
    "The folder of larger data sets that may lie beside the checkout; tests that need it are skipped without."
    folder = repo.parent / "shared" / "data"
    if not folder.is_dir(): pytest.skip(f"no data sets beside the checkout: {folder} does not exist")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Path:
    "No test reads or fills the user's cache; child processes inherit this."
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LNL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "JupyterLab for the tests of a file: skipped without a browser, failed where one is required."
    if reason := browser.why_no_browser():
        if os.environ.get("LNL_REQUIRE_BROWSER") == "1": pytest.fail(reason)
        pytest.skip(reason)
    with browser.Server(tmp_path_factory.mktemp("lab")) as running: yield running


@pytest.fixture
def lab(server, tmp_path):
    "A fresh page; a failed test's report names a picture of its end and shows all complaints."
    with browser.Lab(server) as page:
        yield page
        if not page.page.is_closed(): print("last seen:", page.screenshot(tmp_path / "end.png"))
        print("page errors:", *page.page_errors, "console errors:", *page.console_errors, sep="\n  ")
        print("server:", server.log.read_text()[-1500:])
