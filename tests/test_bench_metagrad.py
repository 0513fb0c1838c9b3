"The bench of meta-gradients: its rows, its memory, and what it refuses."

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from lnl_bench.cli import app
from lnl_bench.data.checks import BadInput
from lnl_bench.repro.bench_metagrad import VARIANTS, MetagradBench, Step, measure, most_held

TINY = MetagradBench(nets="cnn-small", size=16, batch=20, trusted=10, rounds=5, device="cpu", threads=1)


def test_rows_from_the_command_line():
    sets = [f"{f.name}={getattr(TINY, f.name)}" for f in dataclasses.fields(TINY)]
    said = CliRunner().invoke(app, ["bench", "metagrad", "--json", *(x for s in sets for x in ("--set", s))])
    assert said.exit_code == 0, said.output
    rows = json.loads(said.stdout)
    assert [r["name"] for r in rows] == [f"cnn-small: {v}" for v in VARIANTS]
    assert rows[0]["ratio"] == 1.0 and rows[1]["of_reverse"] == 1.0
    assert all(r["ratio"] > 1 for r in rows[1:]), "a step with a meta-gradient costs more than a plain one"


@pytest.mark.parametrize("changes, message", [
    (dict(nets="resnet19"), "resnet19"), (dict(nets=","), "names none"), (dict(nets="cnn9", size=8), "8")])
def test_networks_that_cannot_be_measured(changes, message):
    with pytest.raises(BadInput, match=message): measure(dataclasses.replace(TINY, **changes), "off")


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    measure(dataclasses.replace(TINY, rounds=1), "off")
    assert torch.get_num_threads() == before


def test_memory_is_that_of_the_call():
    "What a call holds is seen, also when a larger one came before it."
    sizes = [most_held(lambda n=n: torch.ones(n, 2**18).sum(), torch.device("cpu")) for n in (300, 60)]
    if None in sizes: pytest.skip("memory is not measured on this system")
    for n, held in zip((300, 60), sizes, strict=True): assert n * 2**20 * 0.9 < held < (n + 40) * 2**20


def test_a_graph_that_is_kept_holds_more():
    step = Step("reverse", "cnn-small", dataclasses.replace(TINY, size=32, batch=100, trusted=100))
    plain = Step("plain", "cnn-small", dataclasses.replace(TINY, size=32, batch=100, trusted=100))
    for s in (step, plain): s()
    held = [most_held(s, torch.device("cpu")) for s in (step, plain)]
    if None in held: pytest.skip("memory is not measured on this system")
    assert held[0] > 1.3 * held[1]
