"""What every test shares: few threads, a cache of its own, and the optional data beside the checkout."""

import os
from pathlib import Path

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
