"""Notebooks as a reader meets them: in JupyterLab, in a real browser."""

import shutil

import browser
import pytest

# One server and one browser at a time, whatever the number of workers.
pytestmark = [pytest.mark.browser, pytest.mark.timeout(240), pytest.mark.xdist_group("browser")]


def test_stored_figures_show_without_running_anything(lab, server, repo):
    shutil.copy(repo / "nbs" / "repro" / "repro_dmlp.ipynb", server.notebooks)
    lab.open("repro_dmlp.ipynb")
    figures = lab.panel.locator(".js-plotly-plot")
    lab.plot(5)
    assert figures.count() == 6
    for number in range(6):
        (first, *_) = lab.plot_data(number)
        assert first["type"] in ("bar", "heatmap", "image", "scatter") or "z" in first, first.keys()
        assert figures.nth(number).bounding_box()["height"] > 100
    assert not lab.external and not lab.page_errors and not lab.tracebacks()


def test_nothing_is_left_running(server):
    with browser.Lab(server) as lab:
        lab.open(server.write( "left.ipynb", """
import subprocess
left = subprocess.Popen(["sleep", "600"], start_new_session=True)
"""))
        lab.run_all()
        lab.idle()
        assert "sleep" in [p.name() for p in server.processes()]
    assert server.processes() == []
