"Open-set noise: which images, their pixels, what is known of them, and everything that reads a truth of -1."

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_task import reachable
from torchvision import transforms
from typer.testing import CliRunner

from lnl_bench.cli import app
from lnl_bench.data.checks import BadInput
from lnl_bench.data.noise import Noise, make_noise, noise_of, restricted, transition_matrix
from lnl_bench.data.open_set import open_set
from lnl_bench.data.sources import Source, TensorImages, digits, from_arrays, image_folder, uneven_digits
from lnl_bench.data.task import long_tailed, make_task, subset, truth_of
from lnl_bench.engine import metrics
from lnl_bench.engine.runs import open_run, save_arrays, write_json
from lnl_bench.engine.train import train
from lnl_bench.methods.catalogue import configured
from lnl_bench.repro.experiment import Parameters, Where, build_task, make_source, noise_on, task_on
from lnl_bench.repro.results import result_row, spread
from lnl_bench.views import explore_figures, labels, lambdas, losses, noise, progress, prototypes, seeds
from lnl_bench.views.cockpit import VIEWS, Look, picture
from lnl_bench.views.moments import read_moment
from lnl_bench.views.theme import OUTSIDE, class_text, read_labels

SOURCE, C, N = digits(), 10, 1297


def pictures(shape, n=600, name="elsewhere", **fields):
    "`n` smooth pictures of random colours in two classes."
    g = torch.Generator().manual_seed(n)
    small = torch.randint(256, (n, shape[0], 3, 3), generator=g).float()
    x = F.interpolate(small, shape[1:], mode="bilinear").byte()
    return from_arrays(x, torch.arange(n) % 2, ("red", "green"), name=name, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "600 pictures of 20 x 24 pixels in files, in two class folders."
    root = tmp_path_factory.mktemp("else") / "photos"
    for i, x in enumerate(pictures((3, 20, 24)).images.tensor):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(root / "ab"[i % 2] / f"{i:03}.png")
    return root


# ---- which images, and by what


@pytest.mark.parametrize("rate", [0, 0.1, 0.29, 0.4, 0.462])
def test_exactly_that_many_are_replaced_and_the_labels_stay(rate):
    mixed, made = open_set(SOURCE, pictures((3, 16, 16)), rate, seed=3)
    outside, k = mixed.labels == -1, math.floor(rate * N + 1e-9)
    assert outside.sum() == k and made.identity["realised"] == k / N and made.identity["nominal"] == rate
    assert torch.equal(made.labels, SOURCE.labels)
    assert torch.equal(mixed.labels[~outside], SOURCE.labels[~outside])
    same = (mixed.images.tensor == SOURCE.images.tensor).flatten(1).all(1)
    assert torch.equal(~same, outside)
    assert mixed.test_images is SOURCE.test_images and mixed.test_labels is SOURCE.test_labels
    for name in ("ids", "mean", "std", "name"): assert getattr(mixed, name) == getattr(SOURCE, name)
    assert mixed.open_set and mixed.labels_are_true and not SOURCE.open_set and (SOURCE.labels >= 0).all()


def test_the_seed_decides_both_draws():
    other = pictures((1, 8, 8))
    one, again, two = (open_set(SOURCE, other, 0.4, seed) for seed in (0, 0, 1))
    assert torch.equal(one[0].images.tensor, again[0].images.tensor) and one[1].identity == again[1].identity
    assert not torch.equal(one[0].labels, two[0].labels)
    assert one[1].identity["hash"] != two[1].identity["hash"]
    assert make_task(*one).identity() == make_task(*again).identity() != make_task(*two).identity()


@pytest.mark.parametrize("task_shape, other_shape", [
    ((1, 8, 8), (3, 20, 24)), ((1, 8, 8), (1, 5, 5)), ((3, 16, 12), (1, 40, 40)), ((3, 16, 16), (3, 16, 16))])
def test_pixels_are_those_of_the_other_source_each_used_once(task_shape, other_shape):
    mine = pictures(task_shape, n=200, name="mine", labels_are_true=True)
    mine = dataclasses.replace(mine, class_names=("cat", "dog"))
    other = pictures(other_shape, n=150)
    mixed, _ = open_set(mine, other, 0.5, seed=0)
    how = dict(mode="bilinear", antialias=True, align_corners=False)
    expected = F.interpolate(other.images.tensor.float(), task_shape[1:], **how).round().byte()
    if other_shape[0] > task_shape[0]: expected = transforms.Grayscale()(expected)
    expected = expected.expand(-1, task_shape[0], -1, -1)
    replaced = mixed.images.tensor[mixed.labels == -1]
    equal = (replaced[:, None] == expected).flatten(2).all(2)
    assert (equal.sum(1) == 1).all() and equal.sum(0).max() == 1 and len(replaced) == 100
    by = equal.int().argmax(1)[0]
    mode = {1: "L", 3: "RGB"}
    x = Image.fromarray(other.images.tensor[by].permute(1, 2, 0).squeeze().numpy())
    x = np.asarray(x.resize(task_shape[:0:-1], Image.Resampling.BILINEAR).convert(mode[task_shape[0]]), int)
    assert abs(x.reshape(*task_shape[1:], -1).transpose(2, 0, 1) - replaced[0].numpy()).max() <= 2  # rounding


def test_images_in_files_on_either_side(folder):
    other = image_folder(folder)
    mixed, made = open_set(SOURCE, other, 0.4, seed=0)
    arrays = from_arrays(other.images.tensor, other.labels, ("a", "b"), name="x")
    again, _ = open_set(SOURCE, arrays, 0.4, seed=0)
    assert torch.equal(mixed.images.tensor, again.images.tensor)
    assert made.identity["images_from"] == {"name": "photos", "digest": other.images.digest()}
    assert made.spec == "open-set:0.4:photos" and "(photos)" in made.identity["convention"]
    files = dataclasses.replace(other, labels_are_true=True)
    mixed, _ = open_set(files, pictures((1, 9, 9)), 0.5, seed=0)
    assert isinstance(mixed.images, TensorImages) and mixed.images.shape == (600, 3, 20, 24)


def test_two_sources_of_one_name_make_two_noises():
    sources = [pictures((1, 8, 8), n) for n in (600, 601)]
    made = [open_set(SOURCE, s, 0.1, seed=0)[1].identity for s in sources]
    assert made[0]["spec"] == made[1]["spec"] and made[0]["hash"] != made[1]["hash"]


def test_the_matrix_is_over_samples_that_have_a_class():
    true, given = torch.tensor([0, 0, -1, 1, -1, 2]), torch.tensor([0, 1, 1, 1, 2, 0])
    made = noise_of(given, true, 3, kind="own", spec="own", convention="by hand", dataset="")
    assert made.identity["matrix"] == [[0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]]
    assert made.identity["realised"] == 4 / 6
    part = restricted(made, true, torch.tensor([0, 2, 3]))
    assert part.identity["realised"] == 1 / 3 and part.identity["matrix"][0] == [1, 0, 0]
    with pytest.raises(BadInput, match="label = -2"): transition_matrix(true - 1, given, 3)
    with pytest.raises(BadInput, match="label = -1"): transition_matrix(given, true, 3)


def test_it_is_saved_and_verified(tmp_path):
    mixed, made = open_set(SOURCE, pictures((1, 8, 8)), 0.4, seed=0)
    again = Noise.load(made.save(tmp_path / "n.npz"), true=mixed.labels)
    assert again.identity == made.identity and torch.equal(again.labels, made.labels)
    with pytest.raises(BadInput, match="are wrong"): Noise.load(tmp_path / "n.npz", true=SOURCE.labels)


# ---- the task, and what a method sees


@pytest.mark.parametrize("split", [dict(trusted_per_class=10), dict(trusted_size=200, protocol="random")])
def test_trusted_images_are_never_replaced_ones(split):
    mixed, made = open_set(SOURCE, pictures((1, 8, 8)), 0.45, seed=0)
    for seed in range(10):
        task = make_task(mixed, made, seed=seed, **split)
        assert torch.equal(mixed.labels[task.trusted_index], task.trusted_labels)
        assert task.trusted_labels.min() >= 0
        assert (truth_of(task) == -1).sum() == int(0.45 * N) and (task.given >= 0).all()
    with pytest.raises(BadInput, match="to trust"): make_task(mixed, made, trusted_per_class=100)
    with pytest.raises(BadInput, match="trusted_size = 900"):
        make_task(mixed, made, trusted_size=900, protocol="random")


def test_what_a_method_sees_holds_nothing_of_the_replaced():
    mixed, made = open_set(SOURCE, pictures((3, 16, 16)), 0.4, seed=0)
    task, plain = make_task(mixed, made, trusted_per_class=5), make_task(SOURCE, "none", trusted_per_class=5)
    seen, outside = task.visible(), mixed.labels == -1
    parts = reachable(seen)
    tensors = [t for t in parts.values() if isinstance(t, torch.Tensor)]
    true = truth_of(task)
    hidden = [outside, ~outside, outside.nonzero().flatten(), mixed.labels, true, true == -1]
    alike = [t for t in tensors for h in hidden if t.shape == h.shape and torch.equal(t.cpu().to(h.dtype), h)]
    assert not alike and any(part is task._truth for part in reachable(task).values())
    assert not any(isinstance(part, (Source, type(task), Noise)) for part in parts.values())
    assert type(seen.images) is type(plain.visible().images)
    assert vars(seen.images).keys() == {"tensor", "shape"} == vars(plain.images).keys()
    assert seen.given.min() >= 0 and (seen.labels == -1).sum() == len(seen.trusted_index)


def test_a_source_holds_such_labels_only_where_it_says_so():
    mixed, _ = open_set(SOURCE, pictures((1, 8, 8)), 0.4, seed=0)
    assert "none of them 518" in repr(mixed)
    with pytest.raises(BadInput, match="= -1 is no class"): dataclasses.replace(mixed, open_set=False)
    with pytest.raises(BadInput, match="labels_are_true"): dataclasses.replace(mixed, labels_are_true=False)
    with pytest.raises(BadInput, match="= -2 is no class"):
        dataclasses.replace(mixed, labels=torch.where(mixed.labels < 0, -2, mixed.labels))
    with pytest.raises(BadInput, match="test label"):
        dataclasses.replace(mixed, test_labels=torch.full_like(mixed.test_labels, -1))
    for part in (lambda: subset(mixed, 300), lambda: long_tailed(mixed, 10)):
        with pytest.raises(BadInput, match="none of the classes"): part()
    for spec in ("none", "symmetric:0.2"):
        with pytest.raises(BadInput, match="label = -1"): make_task(mixed, spec)


# ---- bad input


def test_what_cannot_be_is_refused(folder):
    other = pictures((1, 8, 8))
    for rate in (-0.1, 1.2, float("nan")):
        with pytest.raises(BadInput, match="noise rate"): open_set(SOURCE, other, rate, seed=0)
    with pytest.raises(BadInput, match="600 images, fewer than the 648"): open_set(SOURCE, other, 0.5, seed=0)
    with pytest.raises(BadInput, match="class '0'"): open_set(SOURCE, uneven_digits(), 0.1, seed=0)
    suspect = dataclasses.replace(SOURCE, labels_are_true=False)
    with pytest.raises(BadInput, match="labels_are_true"): open_set(suspect, other, 0.1, seed=0)
    with pytest.raises(BadInput, match="replaced already"):
        open_set(open_set(SOURCE, other, 0.1, seed=0)[0], other, 0.1, seed=0)
    with pytest.raises(BadInput, match="lnl_bench.data.open_set.open_set"):
        make_noise("open-set:0.4:cifar100", SOURCE.labels, C, 0)


@pytest.mark.parametrize("spec, words", [
    ("open-set:1.4:photos", "noise rate = 1.4"), ("open-set:x:photos", "open-set:RATE:DATASET"),
    ("open-set:0.4", "open-set:RATE:DATASET"), ("open-set:0.4:", "open-set:RATE:DATASET"),
    ("open-set:0.4:no such place", "'no such place'"), ("open-set:0.4:cifar100", "cifar100 is missing")])
def test_a_spec_that_cannot_be_is_refused(spec, words, tmp_path):
    where = Where(data_dir=str(tmp_path))
    with pytest.raises(BadInput, match=words): noise_on(SOURCE, spec, 0, "digits", where)


# ---- measures against slow loops


def test_measures_with_samples_of_no_class_against_loops():
    rng = np.random.default_rng(0)
    true, given, after = rng.integers(-1, 4, 300), rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    prob = rng.dirichlet(np.ones(4), 300)
    rows = list(zip(true.tolist(), given.tolist(), after.tolist(), strict=True))
    assert metrics.accuracy(given, true) == sum(t == g for t, g, _ in rows) / 300
    report = metrics.label_accuracy(given, true, 4)
    assert report["overall"] == metrics.accuracy(given, true)
    for c in range(4):
        mine = [g == t for t, g, _ in rows if t == c]
        assert report["per_class"][c] == sum(mine) / len(mine)
    counts = metrics.repair_counts(given, after, true)
    assert counts["repaired"] == sum(g != t == a for t, g, a in rows)
    assert counts["broken"] == sum(g == t != a for t, g, a in rows)
    assert counts["moved_wrong"] == sum(g != a and t not in (g, a) for t, g, a in rows)
    assert counts["kept_wrong"] == sum(g == a != t for t, g, a in rows)
    bins = metrics.calibration(prob, true, bins=5)["bins"]
    for b in bins:
        sure = [b["low"] < p.max() <= b["high"] for p in prob]
        inside = [p.argmax() == t for p, t, here in zip(prob, true, sure, strict=True) if here]
        assert b["count"] == len(inside) and (not inside or b["accuracy"] == pytest.approx(np.mean(inside)))
    with pytest.raises(BadInput, match="smallest class in true = -2"): metrics.accuracy(given, true - 1)
    with pytest.raises(BadInput, match="smallest class in predicted"): metrics.accuracy(true, given)


# ---- runs


@pytest.fixture(scope="module", params=["cross-entropy", "mw-net"])
def run(request, folder, tmp_path_factory):
    "A short finished run on 500 digits, 40 % of them replaced."
    task = task_on(make_source("digits[500]", "data"), f"open-set:0.4:{folder}", 0, "digits[500]", 5)
    method = configured(request.param, task, "smoke")
    where = tmp_path_factory.mktemp("runs")
    return train(method, task, runs_dir=where, preset="smoke", progress="off")


def test_a_run_counts_replaced_samples_as_wrong(run):
    given, true, _ = read_labels(run)
    outside, n = true == -1, len(given)
    assert outside.sum() == 200 and n == 450 and (given[~outside] == true[~outside]).all()
    found = run.result
    assert found["label_accuracy_before"] == 250 / 450 and found["noise_detection"]["auc"] is not None
    assert found["label_accuracy_after"] <= 250 / 450
    counts = found["labels"]
    assert counts["repaired"] == 0 and counts["kept_wrong"] + counts["moved_wrong"] == 200
    assert [v is None or 0 <= v <= 1 for v in found["label_accuracy_per_class"]] == [True] * 10
    loss = read_moment(run).arrays["loss"]
    hits = np.mean([(a < b) + 0.5 * (a == b) for a in loss[~outside] for b in loss[outside]])
    assert run.series("loss_auc")[-1] == pytest.approx(hits, abs=1e-6)
    assert "open-set-0.4" in run.path.name


def test_its_row_says_where_the_images_are_from(run):
    row = result_row(run)
    assert (row["noise_type"], row["noise"], row["realised_noise"]) == ("open-set:photos", 0.4, 0.4)
    table = pd.DataFrame([row, row | {"noise_type": "open-set:elsewhere"}])
    assert len(spread(table, ("best",))) == 2


def drawn(fig):
    "The text of a figure that plotly accepts."
    return json.dumps(go.Figure(fig).to_plotly_json(), default=str)


def place_by_hand(moment):
    "A layout without UMAP."
    k, rng = len(prototypes.shown_samples(moment)[0]), np.random.default_rng(0)
    return prototypes.Layout(*(rng.normal(size=(m, 2)).astype(np.float32) for m in (k, len(moment.names))))


def test_every_view_draws_such_a_run(run):
    given, true, names = read_labels(run)
    sample, moment = int(np.flatnonzero(true == -1)[0]), read_moment(run)
    for klass in (None, "all", 3): drawn(losses.losses_figure(moment, klass))
    for show in labels.SHOWS:
        for klass in (None, 3): drawn(labels.labels_figure(run, moment, klass, show))
    drawn(labels.per_class_figure(run))
    drawn(labels.label_accuracy_figure(run))
    assert f"true {OUTSIDE}" in drawn(lambdas.lambda_figure(run, sample))
    if run.about["method"] == "mw-net": drawn(lambdas.curve_figure(moment))
    drawn(progress.progress_figure(run))
    assert progress.status_line(run)
    drawn(seeds.seeds_figure({"it": [run]}, "noise_auc", "AUC", "AUC"))
    assert "In no row: 200 images" in drawn(noise.transition_figure(run)).replace("<br>", " ")
    found = explore_figures.memorised(run)
    drawn(explore_figures.memorisation_figure(found, int(found["epoch"][-1]), "open-set"))
    rates = explore_figures.wrong_rates(given, true, C)
    assert len(rates) == C and np.nansum(rates) == 0
    assert len(names) == C


def test_the_cockpit_draws_such_a_run(run):
    for view, (offers, _) in VIEWS.items():
        if view == "Prototypes": continue  # with a layout by hand, below
        for show in [value for _, value in offers] or [""]:
            curve = show == "by loss" and run.about["method"] != "mw-net"
            for klass in (None, 3):
                if not curve: assert drawn(picture(run, Look(view, show, klass)))
    given, true, names = read_labels(run)
    told = [(names[g], class_text(names, t)) for g, t in zip(given[:40], true[:40], strict=True)]
    fig = noise.examples_figure(np.zeros((40, 1, 8, 8), np.uint8), told)
    assert f"{(given != true)[:40].sum()} of 40 labels are wrong" in drawn(fig)


def test_prototypes_draw_samples_of_no_class_apart(run):
    given, true, _ = read_labels(run)
    moment = prototypes.shown_moment(run)
    placed = place_by_hand(moment)
    for colour in prototypes.colourings(moment):
        for highlight in (None, 3): drawn(prototypes.prototypes_figure(moment, placed, colour, highlight))
    fig = prototypes.prototypes_figure(moment, placed, "true")
    apart = next(t for t in fig.data if t.name == OUTSIDE)
    position = prototypes.shown_samples(moment)[0]
    assert len(apart.x) == (true[position] == -1).sum() > 0
    assert all(f"true: {OUTSIDE}" in text for text in apart.text)
    place = int(np.flatnonzero(true[position] == -1)[0])
    told = prototypes.thumbnail_html(moment, place)
    assert f"true: {OUTSIDE}" in told and "its label is wrong now" in told
    wrong = next(t for t in prototypes.prototypes_figure(moment, placed, "right").data if "wrong" in t.name)
    assert len(wrong.x) == (given != true)[position].sum()


def test_prototypes_of_many_classes_leave_no_class_out_of_the_scale(tmp_path):
    run, rng = open_run(tmp_path / "many", {"seed": 0}, {"stages": ["train"]}), np.random.default_rng(0)
    true = rng.integers(-1, 30, 400)
    write_json(run.path / "task.json", {"class_names": [f"c{i}" for i in range(30)]})
    index, given = np.arange(400), rng.integers(0, 30, 400)
    save_arrays(run.path / "samples.npz", {"index": index, "given": given, "true": true})
    save_arrays(run.path / "shown.npz", {"position": index, "picture": np.zeros((400, 1, 4, 4), np.uint8)})
    run.save_snapshot("train", 0, {"features": rng.normal(size=(400, 5)).astype(np.float16)})
    moment = read_moment(run)
    places = place_by_hand(moment)
    fig = prototypes.prototypes_figure(moment, places, "true")
    sizes = {t.name: len(t.x) for t in fig.data}
    assert sizes[OUTSIDE] == (true == -1).sum() and sizes["samples"] == (true >= 0).sum()
    assert OUTSIDE not in {t.name for t in prototypes.prototypes_figure(moment, places, "given").data}


def test_per_class_numbers_leave_them_out(run):
    given, true, _ = read_labels(run)
    shares = labels.per_class(given, true, C)
    assert (shares == 1).all()  # a label that stands on an image of its class is right
    matrix = labels.transition_matrix(true, given, C)
    assert (matrix == np.eye(C)).all()
    _, over_epochs, before, note = labels.class_shares(run)
    prediction = read_moment(run).arrays["prediction"]
    expected = [np.mean(prediction[true == c] == c) for c in range(C)]
    assert np.allclose(over_epochs[:, -1], expected) and (before == 1).all()
    assert f"200 samples show {OUTSIDE}" in note
    history = labels.label_history(run)[-1][2]
    assert history.right.sum() == np.sum(prediction == true) and history.repaired.sum() == 0


# ---- by name


def test_from_the_command_line(folder, tmp_path):
    asked = ["train", "cross-entropy", "--data", "digits[300]", "--noise", f"open-set:0.4:{folder}",
             "--preset", "smoke", "--trusted", "2", "--runs-dir", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["label_accuracy_before"] == pytest.approx(160 / 280)
    done = CliRunner().invoke(app, [*asked[:5], f"open-set:0.4:{tmp_path}/nothing", *asked[6:]])
    assert isinstance(done.exception, BadInput) and "nothing" in str(done.exception)


def test_from_a_notebook(folder, tmp_path):
    noise = dict(noise=0.4, noise_type=f"open-set:{folder}")
    p = Parameters(dataset="digits[300]", trusted=2, runs_dir=str(tmp_path), **noise)
    task = build_task(p)
    assert (truth_of(task) == -1).sum() == 120
    assert task.noise["kind"] == "open-set" and task.noise["seed"] == 0
    other = build_task(dataclasses.replace(p, seed=1))
    assert other.images.digest() != task.images.digest()
