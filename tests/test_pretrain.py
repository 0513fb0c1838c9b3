"Contrastive losses against slow loops, both methods under the engine's contract, and the feature store."
import collections
import dataclasses
import math
import multiprocessing

import numpy as np
import pytest
import torch

from lnl_bench.data.checks import BadInput, setting
from lnl_bench.data.sources import digits
from lnl_bench.data.task import make_task
from lnl_bench.engine import pretrain as P
from lnl_bench.engine.contract import make_method
from lnl_bench.engine.lab import Lab
from lnl_bench.engine.runs import Run, read_json
from lnl_bench.engine.train import Stopped, load_checkpoint, train

QUICK = {"net": "cnn-digits", "batch": 256, "rate": 0.02, "temperature": 0.2, "epochs": 2}
RANDOM = P.FeatureConfig(representation="random", feature_net="cnn-digits")
SHORT = P.FeatureConfig(feature_net="cnn-digits", feature_epochs=2, feature_batch=256, feature_rate=0.02)


@pytest.fixture(scope="module")
def source(): return digits()


@pytest.fixture(scope="module")
def task(source): return make_task(source, "symmetric:0.4", trusted_per_class=10, seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    "Equal bits are promised for an equal number of threads."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draws(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=g, requires_grad=True) for s in shapes]


# --- kernels ---


def slow_nt_xent(z1, z2, tau):
    z = [v / v.norm() for v in (*z1, *z2)]
    n, total = len(z), 0
    for i in range(n):
        others = sum(((z[i] @ z[k]) / tau).exp() for k in range(n) if k != i)
        total = total - ((z[i] @ z[(i + n // 2) % n] / tau).exp() / others).log()
    return total / n


@pytest.mark.parametrize("tau", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_nt_xent_and_its_gradient(tau, size):
    z1, z2 = draws((size, 3), (size, 3))
    fast, slow = P.nt_xent(z1, z2, tau), slow_nt_xent(z1, z2, tau)
    torch.testing.assert_close(fast, slow)
    assert torch.isclose(fast, P.nt_xent(z2, z1, tau)) and torch.isclose(fast, P.nt_xent(3 * z1, z2, tau))
    for a, b in zip(torch.autograd.grad(fast, (z1, z2)), torch.autograd.grad(slow, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_info_nce_and_its_gradient():
    q, k, queue = draws((4, 3), (4, 3), (6, 3))
    unit, slow = torch.nn.functional.normalize, 0
    for a, b in zip(unit(q), unit(k), strict=True):
        right = (a @ b / 0.2).exp()
        slow = slow - (right / (right + sum((a @ other / 0.2).exp() for other in unit(queue)))).log() / 4
    fast = P.info_nce(q, k, queue, 0.2)
    torch.testing.assert_close(fast, slow)
    gradients = torch.autograd.grad(fast, q), torch.autograd.grad(slow, q)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_projections_give_a_float32_loss(dtype):
    z1, z2, queue = (v.detach().to(dtype) for v in draws((8, 16), (8, 16), (5, 16)))
    for loss in (P.nt_xent(z1, z2, 0.07), P.info_nce(z1, z2, queue, 0.07)):
        assert loss.dtype == torch.float32 and loss.isfinite()


def test_queue_keeps_the_newest_keys():
    queue, pointer, model = torch.zeros(7, 1), 0, collections.deque([0.0] * 7, maxlen=7)
    for start in range(1, 40, 3):
        keys = torch.arange(start, start + 3.0)[:, None]
        pointer = P.enqueue(queue, pointer, keys)
        model.extend(keys[:, 0].tolist())
        assert queue.roll(-pointer, 0)[:, 0].tolist() == list(model)


def test_learning_rate_rises_then_falls_without_a_jump():
    rates = [P.cosine_rate(t / 100, 20, 0.5, warm_up=2) for t in range(2001)]
    assert all(a < b for a, b in zip(rates[:200], rates[1:201], strict=True))
    assert all(a > b for a, b in zip(rates[200:-1], rates[201:], strict=True))
    assert max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) < 0.003
    assert math.isclose(rates[0], 0.01) and math.isclose(rates[-1], 0.0005)


def test_uniformity_of_points_spread_at_random_is_that_of_the_sphere():
    z = draws((2000, 8))[0]
    expected = -4 + math.log(6 * 0.5**3 * 3.33727)  # log of exp(-4) Gamma(4) (2/4)^3 I_3(4), in 8 dimensions
    assert P.alignment_uniformity(z, z)["uniformity"] == pytest.approx(expected, abs=0.03)
    assert P.alignment_uniformity(z, -z)["alignment"] == pytest.approx(4)


# --- methods ---


def pretrain(method, task, folder, **more): return train(method, task, run_dir=folder, progress="off", **more)
def encoder_of(run): return load_checkpoint(run)["lab"]["results"][run.about["method"]]["encoder"]


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(params=["simclr", "moco"])
def method(request):
    own = {"queue": 300} if request.param == "moco" else {"scale": "paper"}
    return make_method(request.param, QUICK | own)


def test_contract(method, task, tmp_path):
    "Finite, the same bits from the same seed, other bits from another, no labels, no accuracy."
    run, twin, other = (pretrain(method, task, tmp_path / str(i), seed=s) for i, s in enumerate((0, 0, 1)))
    rows = run.metrics.read()[0]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert (run.path / "metrics.jsonl").read_bytes() == (twin.path / "metrics.jsonl").read_bytes()
    assert equal(encoder_of(run), encoder_of(twin)) and not equal(encoder_of(run), encoder_of(other))
    assert run.result["best"] is None and not (run.path / "labels.csv").exists()


def test_labels_do_not_matter(method, task, tmp_path):
    wrong = task.relabel((task.given + 1) % 10, by="a mistake")
    runs = [pretrain(method, t, tmp_path / str(i)) for i, t in enumerate((task, wrong))]
    assert equal(*map(encoder_of, runs))


def test_resumed_equals_uninterrupted(method, task, tmp_path, monkeypatch):
    whole = pretrain(method, task, tmp_path / "whole")
    stage, epoch = type(method.stages()[0]), P.Contrast.epoch

    def interrupted(self, lab, number):
        if number == 1: raise RuntimeError("power cut")
        return epoch(self, lab, number)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "epoch", interrupted)
        with pytest.raises(RuntimeError, match="power cut"): pretrain(method, task, tmp_path / "cut")
    resumed = pretrain(method, task, tmp_path / "cut")
    assert (resumed.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    assert equal(encoder_of(resumed), encoder_of(whole))
    assert torch.equal(*(load_checkpoint(r)["stage"].get("queue", torch.zeros(1)) for r in (whole, resumed)))


def test_bfloat16_agrees(method, task, tmp_path):
    exact, rough = (pretrain(method, task, tmp_path / p, precision=p) for p in ("float32", "bfloat16"))
    assert exact.series("loss") != rough.series("loss")
    assert rough.series("loss") == pytest.approx(exact.series("loss"), rel=0.05)


def test_released_scale_is_a_factor(task):
    losses = {}
    for scale in ("paper", "released"):
        stage, lab = P.SimCLRStage(P.SimCLRConfig(**QUICK, scale=scale)), Lab(task)
        stage.start(lab)
        batch = next(lab.batches(size=64, views=("simclr", "simclr")))
        losses[scale] = stage.loss(*stage.project(*batch.views))
    assert torch.isclose(losses["released"], losses["paper"] * 0.2 / 0.07)


def test_batches_larger_than_the_data_are_one_batch(source, tmp_path):
    small = P.unlabelled_task(make_task(source, "none"))
    small = dataclasses.replace(small, train_index=torch.arange(20))
    for name in ("simclr", "moco"):
        run = pretrain(make_method(name, QUICK), small, tmp_path / name)
        assert run.result["passes"]["forward"] == 2 * 40


# --- what features depend on ---


def key(task, config, **lab): return P.fingerprint(P.feature_identity(Lab(task, **lab), config))


def test_noise_split_and_seed_do_not_change_the_key(source, task):
    others = [make_task(source, "pair-flip:0.2"), make_task(source, "none", trusted_per_class=3, seed=4)]
    assert {key(t, SHORT, seed=i) for i, t in enumerate([task, *others])} == {key(task, SHORT)}


@pytest.mark.parametrize("change", [
    {"representation": "moco"}, {"representation": "random"}, {"feature_net": "resnet32"},
    {"feature_seed": 1}, {"feature_epochs": 3}, {"feature_batch": 64}, {"feature_rate": 0.1},
    {"feature_temperature": 0.1}, {"feature_scale": "paper"}])
def test_settings_change_the_key(task, change):
    assert key(task, dataclasses.replace(SHORT, **change)) != key(task, SHORT)


@pytest.mark.parametrize("change", [{"pad": 2}, {"flip": True}, {"mean": (0.1,)}])
def test_input_changes_the_key(task, change):
    assert key(dataclasses.replace(task, **change), SHORT) != key(task, SHORT)


def test_precision_changes_the_key(task): assert key(task, SHORT, precision="bfloat16") != key(task, SHORT)


def test_a_method_that_inherits_the_settings_shares_the_features(task):
    @dataclasses.dataclass(frozen=True)
    class Mine(P.FeatureConfig):
        epochs: int = setting(5, "of my own", low=1)
        net: str = setting("resnet18", "of my own")

    assert key(task, Mine(**dataclasses.asdict(SHORT))) == key(task, SHORT)


# --- the store ---


def test_a_hit_does_not_train(task, tmp_path, monkeypatch):
    first = P.features_of(Lab(task, cache_dir=tmp_path), SHORT, "off")
    monkeypatch.setattr(P, "train", lambda *a, **k: pytest.fail("trained again"))
    again = P.features_of(Lab(task, cache_dir=tmp_path), SHORT, "off")
    assert torch.equal(first.train, again.train) and equal(first.net.state_dict(), again.net.state_dict())
    assert first.train.dtype == torch.float32 and first.train.shape == (1297, 128)
    assert Run(again.run).finished and not again.net.training
    assert not any(p.requires_grad for p in again.net.parameters())


def test_hit_and_miss_leave_the_outer_run_alike(task, tmp_path):
    states = []
    for _ in range(2):
        lab = Lab(task, cache_dir=tmp_path)
        torch.manual_seed(7)
        P.features_of(lab, SHORT, "off")
        states.append((torch.get_rng_state(), lab.passes, lab.results))
    miss, hit = states
    assert torch.equal(miss[0], hit[0]) and miss[1:] == hit[1:] == ({"forward": 0, "backward": 0}, {})


@pytest.mark.parametrize("representation", ["random", "pixels", "simclr", "moco"])
def test_rows_are_the_sources_images(task, tmp_path, representation):
    lab = Lab(task, cache_dir=tmp_path)
    features = P.features_of(lab, dataclasses.replace(SHORT, representation=representation), "off")
    rows = torch.tensor([1296, 0, 7])
    seen = features.of(lab.view("none", rows))
    torch.testing.assert_close(seen, features.train[rows], atol=1e-5, rtol=1e-5)
    assert (features.net is None) == (representation == "pixels") and len(features.train) == 1297


def spoil_text(folder): (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:5000])
def spoil_shape(folder): np.save(folder / "features.npy", np.zeros((5, 128), np.float32))
def spoil_type(folder): np.save(folder / "features.npy", np.zeros((1297, 128)))
def spoil_objects(folder): np.save(folder / "features.npy", np.array([{}], object), allow_pickle=True)
def spoil_encoder(folder): (folder / "encoder.pt").write_bytes(b"no encoder")
def spoil_cut(folder): (folder / "encoder.pt").write_bytes((folder / "encoder.pt").read_bytes()[:3000])
def spoil_weights(folder): torch.save({"head.weight": torch.zeros(2)}, folder / "encoder.pt")
def spoil_meta(folder): (folder / "meta.json").unlink()
def spoil_key(folder): (folder / "meta.json").write_text('{"key": "another", "run": null}')


@pytest.mark.parametrize("spoil", [v for k, v in list(globals().items()) if k.startswith("spoil_")])
def test_a_damaged_entry_is_named_and_kept(task, tmp_path, spoil):
    whole = P.features_of(Lab(task, cache_dir=tmp_path), RANDOM)
    folder = tmp_path / "features" / whole.key
    spoil(folder)
    lab = Lab(task, cache_dir=tmp_path)
    with pytest.raises(BadInput, match="delete that folder") as e: P.features_of(lab, RANDOM)
    assert str(folder) in str(e.value) and folder.is_dir()


def test_what_a_killed_process_left_is_no_entry(task, tmp_path):
    whole = P.features_of(Lab(task, cache_dir=tmp_path / "a"), RANDOM)
    left = tmp_path / "b" / "features" / f".{whole.key}.part"
    left.mkdir(parents=True)
    (left / "features.npy").write_bytes(b"half")
    again = P.features_of(Lab(task, cache_dir=tmp_path / "b"), RANDOM)
    assert torch.equal(whole.train, again.train) and not left.exists()


def test_record_says_what_it_was_made_from(task, tmp_path):
    features = P.features_of(Lab(task, cache_dir=tmp_path), SHORT, "off")
    meta = read_json(tmp_path / "features" / features.key / "meta.json")
    assert meta["identity"]["settings"]["epochs"] == 2 and meta["identity"]["images"] == task.images.digest()
    assert tmp_path / meta["run"] == features.run and Run(features.run).result["passes"]["backward"] > 0


def _compute(task, folder, out):
    torch.set_num_threads(1)
    out.put(P.features_of(Lab(task, cache_dir=folder), SHORT, "off").train.numpy().tobytes())


def test_two_processes_compute_once(task, tmp_path):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    both = [context.Process(target=_compute, args=(task, tmp_path, out)) for _ in range(2)]
    for p in both: p.start()
    assert out.get(timeout=100) == out.get(timeout=100)
    for p in both: p.join()
    [run] = (tmp_path / "pretrain").iterdir()
    assert [row["epoch"] for row in Run(run).metrics.read()[0]] == [0, 1]


def test_stopping_the_outer_run_stops_pretraining(task, tmp_path):
    lab, calls = Lab(task, cache_dir=tmp_path), []

    def stop():
        calls.append(1)
        if len(calls) > 1: raise Stopped

    lab.poll = stop
    with pytest.raises(Stopped): P.features_of(lab, SHORT, "off")
    [run] = (tmp_path / "pretrain").iterdir()
    assert Run(run).status()["state"] == "stopped" and not list((tmp_path / "features").glob("*/meta.json"))
    assert P.features_of(Lab(task, cache_dir=tmp_path), SHORT, "off").run == run


def test_a_process_that_waits_can_be_stopped(task, tmp_path):
    def stop(): raise Stopped

    with P.locked(tmp_path / "x", lambda: None), pytest.raises(Stopped), P.locked(tmp_path / "x", stop): pass


def test_without_a_cache_folder_it_is_refused(task):
    with pytest.raises(BadInput, match="cache_dir = None"): P.features_of(Lab(task), RANDOM)


@pytest.mark.parametrize("wrong", [
    {"representation": "byol"}, {"feature_epochs": -1}, {"feature_rate": float("nan")}])
def test_refusals(wrong):
    with pytest.raises(BadInput): P.FeatureConfig(**wrong)
