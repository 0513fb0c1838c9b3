"""The meta-gradient: every engine against finite differences through the real optimiser; no trace is left."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lnl_bench.data.checks import BadInput
from lnl_bench.engine.lab import CompiledForward
from lnl_bench.engine.metagrad import (
    ENGINES,
    TrainingPass,
    Trusted,
    VirtualStep,
    meta_gradient,
    step_of,
    trained,
)
from lnl_bench.engine.nets import make_net

SGD = {
    "plain": dict(),
    "weight decay": dict(weight_decay=0.05),
    "momentum": dict(momentum=0.9, weight_decay=0.05),
    "nesterov": dict(momentum=0.9, weight_decay=0.05, nesterov=True),
}
NETS = {
    "batch norm": lambda: make_net("cnn-small", 10, size=8, seed=0),
    "preact-resnet18": lambda: make_net("preact-resnet18", 10, size=8, seed=0),
    "no batch norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 10)),
}

# The large network once, with all that a step may have.
CASES = [(n, s) for n in NETS for s in SGD if n != "preact-resnet18" or s == "nesterov"]


def batch(n, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g).to(dtype), torch.randint(10, (n,), generator=g)


def weighted(u, y): return lambda z: (u * F.cross_entropy(z, y, reduction="none")).mean()


def trusted_batch(n=6, dtype=torch.float32, **options):
    x, y = batch(n, 1, dtype)
    return Trusted(x, lambda z: F.cross_entropy(z, y), **options)


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def setting(net, sgd, dtype=torch.float64, n=8):
    "A network and an optimiser whose momentum buffers are filled, a batch and weights."
    torch.manual_seed(0)
    net = NETS[net]().to(dtype)
    optimiser = torch.optim.SGD(net.parameters(), 0.05, **SGD[sgd])
    x, y = batch(n, dtype=dtype)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net, optimiser, x, y, torch.rand(n, dtype=dtype, requires_grad=True)


def after_real_step(net, optimiser, x, loss, trusted):
    net, optimiser = copy.deepcopy((net, optimiser))
    loss(net(x)).backward()
    optimiser.step()
    return trusted.at(net, trained(net), contextlib.nullcontext).item()


@pytest.mark.parametrize("engine", ["forward", "reverse"])
@pytest.mark.parametrize("net,sgd", CASES)
def test_exact_engines_agree_with_finite_differences_through_the_real_step(net, sgd, engine):
    net, optimiser, x, y, u = setting(net, sgd)
    trusted = trusted_batch(dtype=torch.float64)
    found = meta_gradient(TrainingPass(net, x), weighted(u, y), [u], trusted, step_of(optimiser, net), engine)
    for i in (0, 3, 7):
        bump = torch.zeros_like(u).index_fill(0, torch.tensor(i), 1e-5)
        up, down = (after_real_step(net, optimiser, x, weighted(u.detach() + s * bump, y), trusted)
                    for s in (1, -1))
        assert abs(found.gradients[0][i].item() - (up - down) / 2e-5) < 1e-5 * found.norm


@pytest.mark.parametrize("net,sgd", CASES)
def test_forward_equals_reverse_in_single_precision(net, sgd):
    net, optimiser, x, y, u = setting(net, sgd, torch.float32, n=16)
    arguments = (weighted(u, y), [u], trusted_batch(16), step_of(optimiser, net))
    a, b = (meta_gradient(TrainingPass(net, x), *arguments, e).gradients[0] for e in ("forward", "reverse"))
    assert relative(a, b) < 1e-5


@pytest.mark.parametrize("net", NETS)
def test_difference_is_near_and_knows_its_error(net):
    net, optimiser, x, y, u = setting(net, "momentum", torch.float32, n=32)
    arguments = (weighted(u, y), [u], trusted_batch(32), step_of(optimiser, net))
    exact = meta_gradient(TrainingPass(net, x), *arguments).gradients[0]
    found = meta_gradient(TrainingPass(net, x), *arguments, "difference", check=True)
    error = relative(found.gradients[0], exact)
    assert error < 0.02 and F.cosine_similarity(found.gradients[0], exact, dim=0) > 0.999
    assert found.error < 0.02 and error < 5 * found.error
    assert meta_gradient(TrainingPass(net, x), *arguments, "difference").error is None


@pytest.mark.parametrize("policy", ["batch", "running"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_trace(engine, policy):
    net, optimiser, x, y, u = setting("preact-resnet18", "nesterov", torch.float32)
    first = TrainingPass(net, x)
    state, momenta = copy.deepcopy(net.state_dict()), copy.deepcopy(optimiser.state_dict())
    modes = [m.training for m in net.modules()]
    trusted = trusted_batch(batchnorm=policy)
    meta_gradient(first, weighted(u, y), [u], trusted, step_of(optimiser, net), engine)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    for a, b in zip(momenta["state"].values(), optimiser.state_dict()["state"].values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert u.grad is None and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert modes == [m.training for m in net.modules()]


def test_the_shared_pass_is_a_real_one():
    net, _, x, y, _ = setting("batch norm", "plain", torch.float32)
    twin = copy.deepcopy(net)
    first = TrainingPass(net, x)
    F.cross_entropy(first.logits, y).backward()
    F.cross_entropy(twin(x), y).backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True): assert torch.equal(a.grad, b.grad)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rebuilt_graph_gives_the_same_steps(engine):
    found = {}
    for graph in ("kept", "rebuilt"):
        net, optimiser, x, y, u = setting("batch norm", "plain", torch.float32)
        first = TrainingPass(net, x, graph=graph)
        step = step_of(optimiser, net)
        found[graph] = meta_gradient(first, weighted(u, y), [u], trusted_batch(), step, engine)
        weighted(u.detach(), y)(first.logits).backward()
        found[graph] = found[graph].gradients[0], net.head.weight.grad, dict(net.named_buffers())
    for a, b in zip(found["kept"][:2], found["rebuilt"][:2], strict=True): torch.testing.assert_close(a, b)
    for k, b in found["kept"][2].items(): assert torch.equal(b, found["rebuilt"][2][k])


def test_running_statistics_can_normalise_trusted_images():
    net, optimiser, x, y, u = setting("batch norm", "plain")
    step, first = step_of(optimiser, net), TrainingPass(net, x)
    for policy in ("batch", "running"):
        trusted = trusted_batch(dtype=torch.float64, batchnorm=policy)
        a, b = (meta_gradient(first, weighted(u, y), [u], trusted, step, e) for e in ("forward", "reverse"))
        torch.testing.assert_close(a.gradients, b.gradients)
        if policy == "running":
            ahead = copy.deepcopy(net)
            losses = weighted(u, y)(net(x))
            gradients = torch.autograd.grad(losses, list(net.parameters()))
            for p, g in zip(ahead.parameters(), gradients, strict=True):
                p.data -= 0.05 * g
            assert torch.isclose(trusted.loss(ahead.eval()(trusted.images)), a.trusted_loss)
    with pytest.raises(BadInput, match="accepted: batch, running"):
        meta_gradient(first, weighted(u, y), [u], trusted_batch(batchnorm="none"), step)


def test_weights_at_zero_make_no_virtual_backward():
    net, _, x, y, _ = setting("batch norm", "plain")
    u = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    backwards = []
    first = TrainingPass(net, x)
    first.raw.register_hook(backwards.append)
    arguments = (weighted(u, y), [u], trusted_batch(dtype=torch.float64), VirtualStep(0.1))
    found = meta_gradient(first, *arguments)
    assert not backwards and found.norm > 0
    torch.testing.assert_close(found.gradients, meta_gradient(first, *arguments, "reverse").gradients)


def test_what_does_not_enter_the_loss_has_gradient_zero():
    net, _, x, y, u = setting("batch norm", "plain", torch.float32)
    idle = torch.ones(3, requires_grad=True)
    trusted, step = trusted_batch(), VirtualStep(0.1)
    for engine in ENGINES:
        found = meta_gradient(TrainingPass(net, x), weighted(u, y), [idle, u], trusted, step, engine)
        assert not found.gradients[0].any() and found.gradients[1].any()
        found = meta_gradient(TrainingPass(net, x), weighted(u.detach(), y), [idle], trusted, step, engine)
        assert not found.gradients[0].any()


def test_frozen_parameters_stay_out():
    net, _, x, y, u = setting("batch norm", "plain")
    for p in net.body.parameters(): p.requires_grad_(False)
    arguments = (weighted(u, y), [u], trusted_batch(dtype=torch.float64), VirtualStep(0.1))
    a, b = (meta_gradient(TrainingPass(net, x), *arguments, e) for e in ("forward", "reverse"))
    assert set(TrainingPass(net, x).weights) == {"head.weight", "head.bias"}
    torch.testing.assert_close(a.gradients, b.gradients)


def test_dropout_is_the_same_in_the_repeated_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Dropout(0.5), nn.Linear(32, 10)).double()
    (x, y), u = batch(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64, requires_grad=True)
    first, found = TrainingPass(net, x), []
    for engine in ("forward", "reverse"):
        torch.manual_seed(1)  # the masks of the trusted pass
        found.append(meta_gradient(first, weighted(u, y), [u], trusted_batch(dtype=torch.float64),
                                   VirtualStep(0.1), engine))
    torch.testing.assert_close(found[0].gradients, found[1].gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_stays_near(engine):
    net, _, x, y, u = setting("batch norm", "plain", torch.float32, n=32)
    arguments = (weighted(u, y), [u], trusted_batch(32), VirtualStep(0.1))
    exact = meta_gradient(TrainingPass(net, x), *arguments).gradients[0]
    first = TrainingPass(net, x, lambda: torch.autocast("cpu", torch.bfloat16))
    found = meta_gradient(first, *arguments, engine).gradients[0]
    assert first.raw.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert F.cosine_similarity(found, exact, dim=0) > 0.98


def test_a_compiled_forward_pass_is_set_aside_and_put_back():
    net, _, x, y, u = setting("batch norm", "plain", torch.float32)
    net.forward = compiled = CompiledForward(net)
    compiled.call = lambda *_: pytest.fail("a compiled pass was used")
    for engine in ENGINES:
        meta_gradient(TrainingPass(net, x), weighted(u, y), [u], trusted_batch(), VirtualStep(0.1), engine)
        assert net.forward is compiled


def test_the_trusted_decay_is_part_of_the_trusted_loss():
    net, _, x, y, u = setting("batch norm", "plain")
    for engine in ("forward", "reverse"):
        none = VirtualStep(0.0)
        both = [trusted_batch(dtype=torch.float64, decay=d) for d in (0.2, 0.0)]
        with_decay, without = (meta_gradient(TrainingPass(net, x), weighted(u, y), [u], t, none, engine)
                               for t in both)
        size = sum(p.square().sum() for p in net.parameters())
        torch.testing.assert_close(with_decay.trusted_loss - without.trusted_loss, 0.1 * size.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_behind_by_many_steps(engine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    (x, y), u, trusted = batch(8), torch.rand(8, requires_grad=True), trusted_batch()
    optimiser = torch.optim.SGD(net.parameters(), 0.01, 0.9)

    def live(): return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for step in range(300):
        first = TrainingPass(net, x)
        meta_gradient(first, weighted(u, y), [u], trusted, step_of(optimiser, net), engine)
        optimiser.zero_grad()
        weighted(u.detach(), y)(first.logits).backward()
        optimiser.step()
        if step == 20: early = live()
    assert live() <= early


def test_unknown_names_are_refused():
    net, optimiser, x, y, u = setting("batch norm", "plain", torch.float32)
    with pytest.raises(BadInput, match="accepted: forward, reverse, difference"):
        meta_gradient(TrainingPass(net, x), weighted(u, y), [u], trusted_batch(), VirtualStep(0.1), "jvp")
    with pytest.raises(BadInput, match="accepted: plain, nesterov"): VirtualStep(0.1, kind="heavy")
    with pytest.raises(BadInput, match="accepted: kept, rebuilt"): TrainingPass(net, x, graph="dropped")
    with pytest.raises(BadInput, match="accepted: SGD"): step_of(torch.optim.AdamW(net.parameters()), net)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_engines_agree_on_a_gpu(precision):
    torch.manual_seed(0)
    net = make_net("preact-resnet18", 10, size=8, seed=0).cuda().to(memory_format=torch.channels_last)
    (x, y), (xt, yt) = ([t.cuda() for t in batch(64, s)] for s in (0, 1))
    u = torch.rand(64, device="cuda", requires_grad=True)
    trusted = Trusted(xt, lambda z: F.cross_entropy(z, yt))

    def amp(): return torch.autocast("cuda", precision, enabled=precision != torch.float32)

    found = {e: meta_gradient(TrainingPass(net, x, amp), weighted(u, y), [u], trusted, VirtualStep(0.05), e)
             for e in ENGINES}
    grads = {e: m.gradients[0] for e, m in found.items()}
    exact = precision == torch.float32
    assert F.cosine_similarity(grads["forward"], grads["reverse"], dim=0) > (0.9999 if exact else 0.95)
    assert F.cosine_similarity(grads["difference"], grads["reverse"], dim=0) > (0.99 if exact else 0.9)
