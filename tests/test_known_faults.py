"Faults that are known from published code of this field; each test fails where ours has the same one."

import copy

import numpy as np
import tasks
import torch
import torch.nn.functional as F

from lnl_bench.data.noise import make_noise
from lnl_bench.data.sources import digits
from lnl_bench.engine import metrics
from lnl_bench.engine.contract import make_method
from lnl_bench.engine.nets import make_net
from lnl_bench.engine.train import train
from lnl_bench.methods.catalogue import configured
from lnl_bench.methods.divide_mix import draw_mixing, recent_mean
from lnl_bench.methods.famus import FaMUSMWNetConfig, SampledMetaWeight
from lnl_bench.methods.mlnt import divergence, meta_loss_gradient
from lnl_bench.methods.pencil import PencilConfig, pencil_rate


def test_the_mixture_sees_every_sample_over_several_epochs():
    "A lost colon, `history[-5]` for `history[-5:]`, fitted the mixture at 90 % noise to a single number."
    history = torch.arange(12.0).reshape(3, 4)
    assert recent_mean(history, 2).tolist() == [2, 3, 4, 5]
    assert recent_mean(history, 9).tolist() == [4, 5, 6, 7]


def test_mixup_is_drawn_from_the_seed_alone():
    "Mixing ratios from NumPy's global state, which nobody seeded, made runs with one seed differ."
    drawn = []
    for state in (0, 1):
        np.random.seed(state)
        drawn.append(draw_mixing(50, 4.0, "pair", torch.Generator().manual_seed(3)))
    for a, b in zip(*drawn, strict=True): assert torch.equal(a, b)
    assert not torch.equal(draw_mixing(50, 4.0, "pair", torch.Generator().manual_seed(4))[0], drawn[0][0])


def test_another_seed_makes_other_noise():
    "One noise file served all seeds, so that a spread over seeds had no part of the noise in it."
    labels = digits().labels
    made = [make_noise("symmetric:0.5", labels, 10, seed=s) for s in (0, 1)]
    assert made[0].identity["hash"] != made[1].identity["hash"]
    assert not torch.equal(made[0].labels, made[1].labels)


def test_symmetric_noise_says_how_much_is_wrong():
    "'50 %' symmetric noise is 45 % where the true class may be drawn; the record has both figures."
    labels = torch.arange(50_000) % 10
    for kind, realised in (("symmetric", 0.45), ("symmetric-excl", 0.5)):
        noise = make_noise(f"{kind}:0.5", labels, 10, seed=0)
        wrong = (noise.labels != labels).float().mean().item()
        assert abs(wrong - realised) < 0.01 and abs(noise.identity["realised"] - wrong) < 1e-6


def test_what_the_classifier_says_is_written_back(tmp_path):
    "`i % 20 == 0 and i == epochs - 1` is never true for 100 epochs: the classifier's update never happened."
    task, corrected = tasks.digits_task("symmetric:0.5", n=400, trusted=5), []
    for write_back in ("every period", "never"):
        changes = {"correction": "eac", "write_back": write_back, "representation": "pixels"}
        method = configured("dmlp", task, "smoke", changes)
        run = train(method, task, run_dir=tmp_path / write_back, progress="off")
        corrected.append(run.result["label_accuracy_after"])
    assert corrected[0] > corrected[1] == run.result["label_accuracy_before"]


def test_best_and_last_stand_side_by_side():
    "A published table of human-label noise is best on the test set: 77 %, where training ends near 67 %."
    scores = metrics.summarise([0.5, 0.77, 0.70, 0.67])
    assert (scores["best"], scores["last"]) == (0.77, 0.67)


def test_first_order_is_first_order_and_virtual_passes_leave_no_trace():
    "A loop that detached its own variable left MLNT second order; its perturbed passes moved BatchNorm."
    torch.manual_seed(0)
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=0).double()
    images, sets = torch.randn(8, 1, 8, 8).double(), torch.randint(10, (2, 8))
    targets, before = torch.randn(8, 10).double().softmax(1), copy.deepcopy(net.state_dict())
    gradient, _ = meta_loss_gradient(net, images, sets, targets, 0.3)
    for k, v in net.state_dict().items(): assert torch.equal(before[k], v), k

    def moved(labels):
        twin = copy.deepcopy(net)
        F.cross_entropy(twin(images), labels).backward()
        with torch.no_grad(): [p.sub_(p.grad, alpha=0.3) for p in twin.parameters()]
        twin.zero_grad()
        return twin

    twins = [moved(labels) for labels in sets]
    for twin in twins: divergence(twin(images), targets).backward()
    for k, g in gradient.items():
        expected = sum(t.get_parameter(k).grad for t in twins) / 2
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-6)


def test_no_trusted_image_is_in_the_noisy_training_set():
    "MW-Net's old loader, which MLC and MSLC ship: 98 % of the clean images stayed in the noisy set as well."
    for seed in range(3):
        task = tasks.digits_task("symmetric:0.4", n=600, trusted=10, seed=seed)
        seen = set(task.train_index.tolist()), set(task.trusted_index.tolist())
        assert len(seen[1]) == 100 and not seen[0] & seen[1] and len(seen[0] | seen[1]) == 600


def test_trusted_images_are_training_images():
    "MLC's matrix took its clean images from the test set, and tested on what was left."
    source, task = digits(), tasks.digits_task("none", n=600, trusted=10)
    assert len(task.test_images) == len(source.test_images) and len(task.images) == 600
    test = {picture.tobytes() for picture in source.test_images.take(torch.arange(500)).numpy()}
    trusted = task.images.take(task.trusted_index).numpy()
    assert not any(picture.tobytes() in test for picture in trusted)


def test_symmetric_noise_draws_from_all_classes():
    "A hard-coded `range(10)` gave CIFAR-100 wrong labels of its first ten classes alone."
    labels = torch.arange(50_000) % 100
    noisy = make_noise("symmetric:0.5", labels, 100, seed=0).labels
    counts = torch.bincount(noisy[noisy != labels], minlength=100)
    assert counts.min() > 0.7 * counts.float().mean() and counts.max() < 1.3 * counts.float().mean()


def test_both_networks_of_elr_plus_see_the_same_noise():
    "Two loaders with a random state each trained the two networks on different splits and noise draws."
    lab, stage = tasks.started(make_method("elr-plus", {"net": "cnn-digits", "epochs": 1}).stages()[0],
                               tasks.digits_task())
    seen = {0: {}, 1: {}}
    learn = stage.learn
    def spy(lab, k, batch, step):
        seen[k] |= dict(zip(batch.index.tolist(), batch.labels.tolist(), strict=True))
        return learn(lab, k, batch, step)
    stage.learn = spy
    stage.epoch(lab, 0)
    assert seen[0] == seen[1] and len(seen[0]) == lab.n


def test_every_gate_is_counted():
    "An `append` outside the loop made FaMUS's count loss one of the last gate alone."
    stage, config = SampledMetaWeight, FaMUSMWNetConfig(net="cnn-digits", batch=40, trusted_batch=20)
    lab, stage = tasks.started(stage(config), tasks.digits_task(trusted=3))
    before = copy.deepcopy(stage.gates)
    stage.epoch(lab, 0)
    for gate, old in zip(stage.gates, before, strict=True):
        assert not torch.equal(gate.layers[2].weight, old.layers[2].weight)


def test_the_last_phase_of_pencil_learns_to_its_end():
    "Floor division, `0.2 // 10`, left two thirds of the phase with a rate of zero."
    config = PencilConfig(epochs=90, plain_until=20, labels_until=30)
    rates = [pencil_rate(config, epoch) for epoch in range(30, 90)]
    assert min(rates) > 0 and rates[0] > rates[25] > rates[-1]
