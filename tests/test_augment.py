"""Augmentation: every operation against torchvision, one picture at a time; the draws; the named views."""

import math
import pickle

import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from lnl_bench.data import augment as A
from lnl_bench.data.checks import BadInput

SHAPES = [(3, 32, 32), (1, 8, 8), (3, 17, 23), (1, 28, 28)]
B = 10
CIFAR = dict(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), pad=4, flip=True)
DIGITS = dict(size=8, mean=(0.3,), std=(0.38,), pad=1, flip=False)


def seeded(seed: int = 0, device: str = "cpu"): return torch.Generator(device).manual_seed(seed)


def noise(shape, n: int = B, seed: int = 0) -> torch.Tensor:
    "Pictures of noise; the first is flat, the second muted, the third half black: where levels are special."
    x = torch.randint(256, (n, *shape), generator=seeded(seed)).byte()
    if n >= 3: x[0], x[1], x[2, :, : shape[1] // 2] = 77, x[1] // 2 + 40, 0
    return x


def spread(low: float, high: float) -> torch.Tensor: return torch.linspace(low, high, B)


def furthest(a: torch.Tensor, b: torch.Tensor) -> float: return (a.float() - b.float()).abs().max().item()


def one_by_one(function, images: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    return torch.stack([function(x, *(p[i].item() for p in parameters)) for i, x in enumerate(images)])


# name → (ours, torchvision's, parameters, levels by which uint8 may differ)
POINTWISE = {
    "brightness": (A.brightness, F.adjust_brightness, [spread(0, 2.5)], 0),
    "contrast": (A.contrast, F.adjust_contrast, [spread(0, 2.5)], 0),
    "saturation": (A.saturation, F.adjust_saturation, [spread(0, 2.5)], 0),
    "sharpness": (A.sharpness, F.adjust_sharpness, [spread(0, 2.5)], 0),
    "hue": (A.hue, F.adjust_hue, [spread(-0.5, 0.5)], 1),  # the same formula in another order of operations
    "grey": (A.grey, F.rgb_to_grayscale, [], 0),
    "invert": (A.invert, F.invert, [], 0),
    "solarize": (A.solarize, F.solarize, [spread(0, 255)], 0),
    "autocontrast": (A.autocontrast, F.autocontrast, [], 0),
    "equalize": (A.equalize, F.equalize, [], 0),
    "posterize": (A.posterize, F.posterize, [torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 8])], 0),
    "rotate": (A.rotate, F.rotate, [spread(-45, 45)], 0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_operation_equals_torchvision(name, shape):
    ours, theirs, parameters, levels = POINTWISE[name]
    images = noise(shape)
    before = images.clone()
    result = ours(images, *parameters)
    assert result.dtype == torch.uint8
    assert furthest(result, one_by_one(theirs, images, *parameters)) <= levels
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(set(POINTWISE) - {"equalize", "posterize", "solarize"}))
def test_floating_point_equals_torchvision(name, shape):
    ours, theirs, parameters, _ = POINTWISE[name]
    images = noise(shape) / 255
    assert furthest(ours(images, *parameters), one_by_one(theirs, images, *parameters)) < 1e-5


@pytest.mark.parametrize("name", ["equalize", "posterize"])
def test_operations_on_levels_take_floating_point(name):
    ours, _, parameters, _ = POINTWISE[name]
    images = noise((3, 32, 32))
    assert furthest(ours(images / 255, *parameters) * 255, ours(images, *parameters)) < 1e-4


def test_solarize_of_floating_point_has_its_threshold_in_their_units():
    images, threshold = noise((3, 32, 32)), spread(3.5, 250.5)
    assert furthest(A.solarize(images / 255, threshold / 255) * 255, A.solarize(images, threshold)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_geometry_equals_torchvision(shape):
    images, slope = noise(shape), spread(-0.3, 0.3)
    right, down = torch.arange(B) - 4, 3 - torch.arange(B)
    moved = one_by_one(lambda x, a, b: F.affine(x, 0.0, [a, b], 1.0, [0.0]), images, right, down)
    assert torch.equal(A.translate(images, right, down), moved)
    for ours, axis in ((A.shear_x, 0), (A.shear_y, 1)):
        def theirs(x, s, axis=axis):
            shear = [0.0, 0.0]
            shear[axis] = math.degrees(math.atan(s))
            return F.affine(x, 0.0, [0, 0], 1.0, shear, center=[0, 0])
        # Where two input pixels are equally near, rounding decides; there are few such pixels.
        assert (ours(images, slope) != one_by_one(theirs, images, slope)).float().mean() < 0.005


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_crops_flips_and_holes_equal_torchvision(shape, kind):
    images, (_, H, W), g = noise(shape).to(kind), shape, seeded(1)
    top, left = A.draw_whole(B, 4, g), A.draw_whole(B, 4, g)
    for border, theirs in (("zeros", "constant"), ("reflect", "reflect")):
        padded = F.pad(images, [2] * 4, padding_mode=theirs)
        expected = one_by_one(lambda x, t, s: F.crop(x, t, s, H, W), padded, top, left)
        assert torch.equal(A.pad_crop(images, top, left, (H, W), 2, border), expected)
    mirrored = A.draw_whole(B, 1, g).bool()
    expected = one_by_one(lambda x, m: F.hflip(x) if m else x, images, mirrored)
    assert torch.equal(A.hflip(images, mirrored), expected)
    expected = one_by_one(lambda x, t, s: F.erase(x, t, s, 3, 3, torch.tensor(5).to(kind)), images, top, left)
    assert torch.equal(A.cutout(images, top, left, 3, fill=5), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [None, (5, 40), (40, 6)])
def test_resized_crop_equals_torchvision(shape, size):
    images, (_, H, W) = noise(shape), shape
    size = size or (H, W)
    window = A.draw_windows((B, H, W), seeded(2), (0.1, 1), (0.5, 2))
    def theirs(x, *w): return F.resized_crop(x, *w, size, InterpolationMode.BILINEAR, antialias=True)
    result = A.resized_crop(images, *window, size)
    assert result.dtype == torch.uint8
    assert furthest(result, one_by_one(theirs, images, *window)) <= 1  # a value halfway between two levels
    images = images / 255
    assert furthest(A.resized_crop(images, *window, size), one_by_one(theirs, images, *window)) < 1e-5


@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("name", [name for name in A.OPERATIONS if name != "Identity"])
def test_policy_operations_equal_torchvision_at_every_strength(name, bins):
    images = noise((3, 32, 32), n=4)
    magnitudes, signed = AutoAugment()._augmentation_space(bins, (32, 32))[name]
    for level in range(bins):
        for sign in (1, -1) if signed else (1,):
            m = sign * (magnitudes[level].item() if magnitudes.ndim else 0.0)
            theirs = torch.stack([_apply_op(x, name, m, InterpolationMode.NEAREST, None) for x in images])
            ours = A.OPERATIONS[name](images, torch.full((4,), sign * level / (bins - 1)))
            if name in ("ShearX", "ShearY", "Rotate"):  # rounding decides ties of the nearest pixel
                assert (ours != theirs).float().mean() < 0.005
            else: assert furthest(ours, theirs) <= 1  # 1 + m differs in its last bit; fractions are dropped


@pytest.mark.parametrize("policy", [p.value for p in AutoAugmentPolicy])
def test_policy_tables_equal_torchvision(policy):
    operation, probability, strength = A.policy_table(policy)
    for i, pair in enumerate(AutoAugment(AutoAugmentPolicy(policy)).policies):
        for j, (name, p, level) in enumerate(pair):
            assert list(A.OPERATIONS)[operation[i, j]] == name
            assert probability[i, j].item() == pytest.approx(p)
            assert strength[i, j].item() == pytest.approx((level or 0) / 9)


def test_windows_are_drawn_as_torchvision_draws_them():
    n, image, scale, ratio = 4000, torch.zeros(1, 32, 32), (0.2, 1.0), (3 / 4, 4 / 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
    ours, theirs = A.draw_windows((n, 32, 32), seeded(), scale, ratio).float(), torch.tensor(drawn).T.float()
    ours, theirs = (torch.cat([w, (w[2] * w[3])[None]]) for w in (ours, theirs))  # and the area
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a.mean() - b.mean()) < 4 * b.std() * math.sqrt(2 / n)
        assert abs(a.std() / b.std() - 1) < 0.06


def test_crop_offsets_are_uniform_in_both_directions():
    rows = torch.arange(32).byte()[:, None].expand(9000, 1, 32, 32)
    for ruler, pixel in ((rows, (4, 0)), (rows.mT, (0, 4))):
        out = A.random_crop(ruler, seeded(5), size=(32, 32), pad=4, border="reflect")
        counts = out[:, 0, *pixel].long().bincount(minlength=9)
        assert len(counts) == 9 and ((counts - 1000) ** 2 / 1000).sum() < 27  # chi square, p = 0.001


def test_flips_are_fair_and_independent_of_neighbours():
    pairs = torch.tensor([0.0, 1.0]).expand(20000, 1, 1, 2)
    mirrored = A.random_flip(pairs, seeded(6))[:, 0, 0, 0]
    assert abs(mirrored.mean() - 0.5) < 0.015
    assert abs((mirrored[1:] == mirrored[:-1]).float().mean() - 0.5) < 0.015


def test_jitter_draws_every_order_equally_often(monkeypatch):
    seen = []
    monkeypatch.setattr(A, "jitter", lambda images, order, *factors: seen.append((order, factors)) or images)
    A.random_jitter(torch.zeros(24000, 3, 1, 1), seeded(), strength=(0.4, 0.3, 0.2, 0.1), p=0.5)
    order, factors = seen[0]
    orders, counts = order[order.any(1)].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and abs(order.any(1).float().mean() - 0.5) < 0.02
    assert (counts - 500).abs().max() < 120
    for f, s, middle in zip(factors, (0.4, 0.3, 0.2, 0.1), (1, 1, 1, 0), strict=True):
        assert f.min() >= middle - s - 1e-6 and f.max() <= middle + s + 1e-6
        assert abs(f.mean() - middle) < 0.01 and abs(f.std() - s / math.sqrt(3)) < 0.01


def test_jitter_follows_each_pictures_order():
    images, g = noise((3, 32, 32)), seeded(3)
    order = torch.rand(B, 4, generator=g).argsort(1) + 1
    factors = [A.draw(B, a, b, g) for a, b in ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))]
    adjust = (None, F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = [x / 255 for x in images]
    for i in range(B):
        for j in order[i].tolist(): expected[i] = adjust[j](expected[i], factors[j - 1][i].item())
    assert furthest(A.jitter(images / 255, order, *factors), torch.stack(expected)) < 1e-4


def test_randaugment_draws_operations_and_strengths_evenly(monkeypatch):
    seen = []
    monkeypatch.setattr(A, "apply_chosen", lambda images, *rest: seen.append(rest) or images)
    A.randaugment(torch.zeros(14000, 1, 1, 1).byte(), seeded(), n=2, levels=(1, 30))
    assert len(seen) == 2
    for choice, operations, strength in seen:
        counts = choice.bincount()
        assert len(counts) == len(operations) == 14 and (counts - 1000).abs().max() < 130
        assert (strength * 30).round().unique().tolist() == [*range(-30, 0), *range(1, 31)]
        assert abs(strength.sign().mean()) < 0.03


def test_autoaugment_applies_with_the_policys_probabilities(monkeypatch):
    seen = []
    monkeypatch.setattr(A, "apply_chosen", lambda images, *rest: seen.append(rest) or images)
    A.autoaugment(torch.zeros(25000, 1, 1, 1).byte(), seeded())
    operation, probability, _ = A.policy_table("cifar10")
    for j, (choice, operations, _) in enumerate(seen):
        expected = torch.zeros(len(operations)).index_add_(0, operation[:, j], probability[:, j] / 25)
        expected[0] = 1 - expected[1:].sum()
        assert (choice.bincount(minlength=len(operations)) / 25000 - expected).abs().max() < 0.012


CASES = [(name, CIFAR, (3, 32, 32)) for name in A.VIEWS] + [(name, DIGITS, (1, 8, 8)) for name in A.VIEWS]


@pytest.mark.parametrize("name, data, shape", CASES)
def test_views(name, data, shape):
    view, images = A.make_view(name, **data), noise(shape)
    before, state = images.clone(), torch.random.get_rng_state()
    out = view(images, seeded(7))
    assert out.shape == images.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert torch.equal(images, before), "the input was written to"
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was used"
    assert torch.equal(out, view(images, seeded(7))), "the same seed gave other bits"
    g = seeded(7)
    view(images, g)
    if name != "none": assert not torch.equal(out, view(images, g)), "a second view equals the first"
    assert view(images[:1], seeded()).shape == (1, *shape)
    assert view(images[:0], seeded()).shape == (0, *shape)
    assert torch.equal(pickle.loads(pickle.dumps(view))(images, seeded(7)), out)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(view(images, seeded(7)), out)


@pytest.mark.parametrize("name, data, shape", [c for c in CASES if c[0] != "none"])
def test_each_picture_is_its_own(name, data, shape):
    view, images = A.make_view(name, **data), noise(shape, n=32)
    same = view(images[5:6].expand(32, -1, -1, -1), seeded(8))
    assert len(same.flatten(1).unique(dim=0)) > 5, "copies of one picture got the same parameters"
    other = images.clone()
    other[5] = 255 - other[5]
    changed = (view(images, seeded(8)) - view(other, seeded(8))).abs().flatten(1).amax(1)
    assert changed[5] > 0, "a picture's view does not depend on the picture"
    assert changed[:5].max() < 1e-5 and changed[6:].max() < 1e-5, "a picture's view depends on its neighbours"


def test_views_stay_on_the_range_of_pictures():
    half = (0.5, 0.5, 0.5)  # black is -1 and white 1
    for name in A.VIEWS:
        out = A.make_view(name, size=32, mean=half, std=half, pad=4, flip=True)(noise((3, 32, 32)), seeded(9))
        assert -1 - 1e-5 <= out.min() and out.max() <= 1 + 1e-5


@pytest.mark.parametrize("name", A.VIEWS)
def test_without_flip_nothing_is_mirrored(name):
    view = A.make_view(name, **{**CIFAR, "flip": False})
    assert A.random_flip not in view.steps + view.after
    mirrored = A.make_view(name, **CIFAR)
    assert (A.random_flip in mirrored.steps) == (name != "none")


def test_views_take_larger_pictures():
    images = noise((3, 40, 36))
    for name in A.VIEWS:
        assert A.make_view(name, **{**CIFAR, "pad": 0})(images, seeded()).shape == (B, 3, 32, 32)
    middle = F.normalize(F.center_crop(images, [32, 32]) / 255, CIFAR["mean"], CIFAR["std"])
    assert furthest(A.make_view("none", **CIFAR)(images), middle) < 1e-6


def test_floating_point_pictures_give_the_same_weak_view():
    images, view = noise((3, 32, 32)), A.make_view("weak", **CIFAR)
    assert furthest(view(images, seeded()), view(images / 255, seeded())) < 1e-5


@pytest.mark.parametrize("changes, message", [
    (dict(size=0), "size = 0"),
    (dict(pad=-1), "pad = -1"),
    (dict(mean=(0.5, 0.5), std=(0.5, 0.5)), "accepted: 1 or 3 numbers"),
    (dict(std=(0.2, 0.0, 0.2)), "std above 0"),
])
def test_make_view_refuses(changes, message):
    with pytest.raises(BadInput, match=message): A.make_view("weak", **{**CIFAR, **changes})


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match="Did you mean 'strong'"): A.make_view("stong", **CIFAR)
    with pytest.raises(BadInput, match="border = 'edge'"):
        A.random_crop(noise((1, 8, 8)), seeded(), size=(8, 8), border="edge")
    with pytest.raises(BadInput, match="policy = 'cifar100'"): A.policy_table("cifar100")


def test_batches_that_do_not_fit_are_refused():
    view = A.make_view("weak", **CIFAR)
    for images in (noise((1, 32, 32)), noise((3, 32, 32))[0], noise((3, 32, 32)).long()):
        with pytest.raises(BadInput, match="accepted"): view(images, seeded())
    with pytest.raises(BadInput, match="generator = None"): view(noise((3, 32, 32)))
    with pytest.raises(BadInput, match="too small"): A.make_view("none", **CIFAR)(noise((3, 16, 16)))
    with pytest.raises(BadInput, match="does not fit"): view(noise((3, 16, 16)), seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("name", A.VIEWS)
def test_views_on_a_gpu(name):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    view, images = A.make_view(name, **CIFAR), noise((3, 32, 32), n=64).cuda()
    out = view(images, seeded(7, "cuda"))
    assert out.is_cuda and torch.equal(out, view(images, seeded(7, "cuda")))
    if name != "none":
        with pytest.raises(BadInput, match="generator is on cpu"): view(images, seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("name", POINTWISE)
def test_operations_on_a_gpu_equal_the_cpus(name):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    ours, _, parameters, _ = POINTWISE[name]
    images = noise((3, 32, 32))
    result = ours(images.cuda(), *(p.cuda() for p in parameters)).cpu()
    # Sums run in another order and sines differ in the last bit: one level, and ties of the nearest pixel.
    differing = (result.int() - ours(images, *parameters).int()).abs() > 1
    assert differing.float().mean() < 0.005
