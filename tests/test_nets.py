"Every network: shapes, counts, seeding, gradients, and the modes that the engine uses."
import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.nets import count_parameters, forward_macs, initialise, make_net, net_names

# Quick on one core; the wider ones are built from the same blocks and are checked by count and shape below.
LIGHT = ["cnn-digits", "cnn-small", "cnn9", "vgg13", "preact-resnet18", "preact-resnet18-final-bn",
         "preact-resnet32", "resnet29-v2", "resnet18", "resnet32", "wrn-10-1", "wrn-10-1-leaky",
         "wrn-10-1-dropout"]
COUNTS = {  # ten classes, three channels
    "resnet18": 11_173_962, "resnet34": 21_282_122, "resnet50": 23_520_842, "resnet32": 464_154,
    "wrn-28-2": 1_467_610, "wrn-28-8": 23_354_842, "wrn-28-10": 36_479_194, "wrn-40-2": 2_243_546,
    "resnet29-v2": 843_786,  # IEG Sec. 5.2: 0.84 million
    "wrn-28-10-dropout": 36_479_194, "tv-resnet18": 11_181_642, "tv-resnet50": 23_528_522,
    # 11,171,146 is the common PreAct ResNet-18, with a bare stem and nothing after the last block.
    "preact-resnet18": 11_171_146 + 2 * 64, "preact-resnet18-final-bn": 11_171_146 + 2 * 512,
    # nine convolutions; a bias, a scale and a shift for each of their 2,048 filters; the head
    "cnn9": 9 * (3*128 + 2*128*128 + 128*256 + 2*256*256 + 256*512) + 512*256 + 256*128 + 3*2048 + 1290,
    # ten convolutions; a bias, a scale and a shift for each of their 2,944 filters; the head
    "vgg13": 9 * (3*64 + 64*64 + 64*128 + 128*128 + 128*256 + 256*256 + 256*512 + 3*512*512) + 3*2944 + 5130}


def side(name): return 64 if name.startswith("tv-") else {"cnn9": 16, "vgg13": 32}.get(name, 8)


def batch(name, n=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, side(name), side(name), generator=generator)


def net_of(name, **more): return make_net(name, 7, size=side(name), seed=0, **more)


@pytest.mark.parametrize("name", sorted({*net_names(), *LIGHT} - {"wrn-28-10-dropout", "wrn-28-8-leaky"}))
def test_features_and_head(name):
    net, x = net_of(name).eval(), batch(name)
    with torch.no_grad():
        features = net.features(x)
        assert features.shape == (2, net.feature_dim) and net.head.in_features == net.feature_dim
        assert torch.equal(net(x), net.head(features)) and net(x).shape == (2, 7)
        assert torch.allclose(net(x[:1]), net(x)[:1], rtol=1e-3, atol=1e-3 * net(x).abs().max().item())


@pytest.mark.parametrize("name", COUNTS)
def test_count(name): assert count_parameters(make_net(name, 10, size=64)) == COUNTS[name]


@pytest.mark.parametrize("name", LIGHT)
def test_gradient_reaches_every_parameter(name):
    net = net_of(name)
    F.cross_entropy(net(batch(name, 4)), torch.tensor([0, 1, 2, 3])).backward()
    def arrived(p): return p.grad is not None and p.grad.isfinite().all() and p.grad.any()
    missing = [key for key, p in net.named_parameters() if not arrived(p)]
    # A bias before BatchNorm has a gradient of 0 up to rounding, which may round to 0.
    biased = name in ("cnn9", "vgg13", "resnet29-v2")
    assert [key for key in missing if not (biased and key.endswith("bias"))] == []


@pytest.mark.parametrize("name", LIGHT)
def test_channels_and_memory_format(name):
    net, x = net_of(name, channels=1).eval(), batch(name, channels=1)
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(plain, last, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("name", LIGHT)
def test_bfloat16(name):
    net, x = net_of(name), batch(name, 16)
    for m in net.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)): m.p = 0.0
    plain = net(x)
    with torch.autocast("cpu", torch.bfloat16): half = net(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("name", LIGHT)
def test_forward_mode_derivative_equals_reverse(name):
    "The meta-gradients push a direction through a network in training mode."
    net, x = net_of(name).double(), batch(name, 4).double()
    for m in net.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)): m.p = 0.0
    weights, target = dict(net.named_parameters()), torch.tensor([0, 1, 2, 3])
    buffers = {key: b.clone() for key, b in net.named_buffers()}
    generator = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in weights.items()}

    def losses(w):
        own = {key: b.clone() for key, b in buffers.items()}
        return F.cross_entropy(torch.func.functional_call(net, (w, own), (x,)), target)

    _, forward = torch.func.jvp(losses, (weights,), (direction,))
    gradient = torch.func.grad(losses)(weights)
    reverse = sum((gradient[key] * direction[key]).sum() for key in weights)
    assert torch.allclose(forward, reverse, rtol=1e-8)


@pytest.mark.parametrize("name", ["cnn-digits", "preact-resnet18", "tv-resnet18"])
def test_seed_decides_the_weights_and_disturbs_nothing(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (make_net(name, 7, size=64, seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    again = second.state_dict()
    assert all(torch.equal(v, again[key]) for key, v in first.state_dict().items())
    assert not torch.equal(first.head.weight, other.head.weight)
    unseeded = make_net(name, 7, size=64)
    assert not torch.equal(before, torch.get_rng_state())
    assert not torch.equal(unseeded.head.weight, first.head.weight)
    torch.manual_seed(5)
    assert torch.equal(make_net(name, 7, size=64).head.weight, unseeded.head.weight)


def test_default_device_and_dtype_of_the_caller_do_not_move_the_weights():
    with torch.device("meta"): net = make_net("cnn-digits", 10, seed=0)
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert torch.equal(net.head.weight, make_net("cnn-digits", 10, seed=0).head.weight)


def test_parameters_do_not_depend_on_the_size():
    for name in ("cnn-digits", "cnn9", "preact-resnet18", "wrn-10-1"):
        small, large = make_net(name, 10, size=12, seed=0), make_net(name, 10, size=40, seed=0)
        assert all(torch.equal(p, q) for p, q in zip(small.parameters(), large.parameters(), strict=True))


def test_copies_and_pickles():
    net, x = net_of("cnn-digits").eval(), batch("cnn-digits")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x)) and twin.spec == net.spec
    again = make_net(net.spec.name, net.spec.num_classes, channels=net.spec.channels, size=net.spec.size)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x), net(x))


def test_initialise_follows_its_rule():
    net = make_net("resnet18", 10, seed=0)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            k = m.kernel_size[0]
            assert abs(m.weight.std().item() / (2 / (k * k * m.out_channels)) ** 0.5 - 1) < 0.05
    assert net.head.bias.eq(0).all()
    assert initialise(net) is net


def test_dropout_only_while_training():
    for name in ("cnn9", "wrn-10-1-dropout"):
        net, x = net_of(name), batch(name)
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("given", [
    dict(name="resnet-18"), dict(name="wrn-29-2"), dict(name="wrn-28-0"), dict(name="wrn-28-99"),
    dict(name=3), dict(name="wrn-999994-1"), dict(name="wrn-D-K"), dict(name=""), dict(name="wrn-28-2-best"),
    dict(num_classes=1), dict(num_classes=10.5), dict(channels=0), dict(size=7), dict(size="32"),
    dict(name="cnn9", size=11), dict(name="vgg13", size=31), dict(name="tv-resnet18", size=31), dict(seed=-1),
    dict(weights="x.pt"), dict(name="tv-resnet18", weights="absent.pt")], ids=str)
def test_refused(given):
    values = dict(name="resnet18", num_classes=10) | given
    name, num_classes = values.pop("name"), values.pop("num_classes")
    with pytest.raises(BadInput, match="accepted"): make_net(name, num_classes, **values)


def test_weights_from_a_file(tmp_path):
    source = make_net("tv-resnet18", 10, size=64, seed=1)
    torch.save(source.body.state_dict() | {"fc.weight": torch.zeros(1000, 512)}, tmp_path / "w.pt")
    net = make_net("tv-resnet18", 5, size=64, seed=2, weights=tmp_path / "w.pt")
    assert all(torch.equal(v, net.body.state_dict()[k]) for k, v in source.body.state_dict().items())
    assert torch.equal(net.head.weight, make_net("tv-resnet18", 5, size=64, seed=2).head.weight)


class Evil:
    def __reduce__(self): return (print, ("code in a weights file ran",))


BAD_FILES = dict(empty=b"", text=b"no archive", code=Evil(), tensor=torch.zeros(3),
                 part={"conv1.weight": torch.zeros(2)})


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_weights_are_refused(tmp_path, content, capsys):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes): path.write_bytes(content)
    else: torch.save(content, path)
    with pytest.raises(BadInput, match="accepted: a state dict"):
        make_net("tv-resnet18", 5, size=64, weights=path)
    assert "ran" not in capsys.readouterr().out


def test_macs():
    net = make_net("cnn-small", 10, seed=0)
    by_hand = (32**2 * 27 * 32 + 16**2 * 9 * 32 * 64 + 8**2 * 9 * 64 * 128 + 4**2 * 9 * 128 * 256) + 256 * 10
    before = copy.deepcopy(net.state_dict())
    assert forward_macs(net, (3, 32, 32)) == by_hand and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert abs(forward_macs(make_net("tv-resnet18", 1000, size=224), (3, 224, 224)) / 1.81e9 - 1) < 0.005


def test_cnn_digits_fits_random_labels():
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, 8, 8), torch.randint(0, 10, (48,))
    net = make_net("cnn-digits", 10, channels=1, size=8, seed=0)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    assert (net(x).argmax(1) == y).all()
    assert 100_000 <= count_parameters(net) <= 250_000
