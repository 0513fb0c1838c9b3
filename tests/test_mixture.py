"Mixtures against scikit-learn and slow loops, and what becomes of rows without two heaps."
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture

from lnl_bench.data.checks import BadInput
from lnl_bench.engine import mixture as X

DIVIDEMIX = dict(reg_covar=5e-4, tol=1e-2, max_iter=10)
nan, inf = math.nan, math.inf


def heaps(seed, n=400, share=0.6, gap=0.45, wide=0.15):
    rng = np.random.default_rng(seed)
    low = rng.random(n) < share
    return torch.tensor(np.where(low, rng.normal(0.15, 0.05, n), rng.normal(0.15 + gap, wide, n)))


def shapes():
    "Rows that are easy, hard, lopsided, skewed, heavily tied, and of one heap."
    rng = np.random.default_rng(5)
    rows = [heaps(s, share=p, gap=g)
            for s, (p, g) in enumerate([(0.5, 0.5), (0.03, 0.5), (0.97, 0.5), (0.5, 0.1)])]
    rows += [torch.tensor(rng.beta(0.4, 3, 400)), torch.tensor(rng.integers(0, 3, 400) / 2.0)]
    return torch.stack([*rows, torch.tensor(rng.normal(0.5, 0.1, 400))])


def start_of(x): return X.gaussian_parameters(x, X.two_means(x, x.isfinite()), 5e-4)


def sklearn_posterior(row, start, settings):
    w, m, v = (p.numpy() for p in start)
    model = GaussianMixture(2, weights_init=w, means_init=m[:, None], precisions_init=1 / v[:, None, None],
                            **settings)
    p = model.fit(row.numpy()[:, None]).predict_proba(row.numpy()[:, None])
    return p[:, model.means_[:, 0].argmin()]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("settings",
                         [DIVIDEMIX, DIVIDEMIX | dict(tol=1e-9, max_iter=300), DIVIDEMIX | dict(max_iter=1),
                                      dict(reg_covar=1e-6, tol=1e-3, max_iter=100)])
def test_posterior_of_scikit_learn(settings):
    x = shapes()
    start = start_of(x)
    ours = X.fit_gaussians(x, start=start, **settings).posterior(x).numpy()
    for k, row in enumerate(x):
        theirs = sklearn_posterior(row, [p[k] for p in start], settings)
        assert np.abs(ours[k] - theirs).max() < 1e-4, k
    if settings["reg_covar"] == 5e-4:
        assert torch.equal(X.fit_gaussians(x, **settings).means,
                           X.fit_gaussians(x, start=start, **settings).means)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_start_of_ones_own():
    x = heaps(3)[None]
    start = tuple(torch.tensor([p]).double() for p in ([0.3, 0.7], [0.9, 0.0], [0.1, 0.02]))
    theirs = sklearn_posterior(x[0], [p[0] for p in start], DIVIDEMIX)
    fit = X.fit_gaussians(x, start=start, **DIVIDEMIX)
    assert fit.means[0, 0] < fit.means[0, 1]
    assert np.abs(fit.posterior(x)[0].numpy() - theirs).max() < 1e-4


def test_the_cut_is_the_best_of_all():
    for seed in range(20):
        row = heaps(seed, n=25, share=0.5, gap=0.2).sort().values.numpy()
        within = [row[:i].var() * i + row[i:].var() * (25 - i) for i in range(1, 25)]
        r = X.two_means(torch.tensor(row)[None], torch.ones(1, 25, dtype=torch.bool))
        assert int(r[0, 0].sum()) == 1 + int(np.argmin(within))


@pytest.mark.parametrize("fit", [X.fit_gaussians, X.fit_betas])
def test_rows_do_not_touch_each_other(fit):
    x = shapes()
    together, padded = fit(x), fit(torch.cat((torch.full((len(x), 7), nan), x), 1))
    for k in range(len(x)):
        alone = fit(x[k:k + 1])
        for other in (together, padded):
            p = other.posterior(x)[k]
            torch.testing.assert_close(p, alone.posterior(x[k:k + 1])[0], atol=1e-9, rtol=0)
    assert torch.equal(together.posterior(x), fit(x).posterior(x)), "the same again, bit by bit"


@pytest.mark.parametrize("fit", [X.fit_gaussians, X.fit_betas])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_two_heaps(fit, dtype):
    alike, one = torch.full((50,), 0.3), torch.cat((torch.tensor([0.2]), torch.full((49,), nan)))
    lost = torch.cat((heaps(0, 48), torch.tensor([nan, inf])))
    x = torch.stack([alike, one, torch.full((50,), nan), torch.full((50,), -inf), lost, alike * 0]).to(dtype)
    found = fit(x)
    p = found.posterior(x)
    assert found.whole.tolist() == [True, True, True, True, False, True]
    assert (p[[0, 5]] == 1).all() and p[1].tolist() == [1.0] + [0.0] * 49 and (p[2:4] == 0).all()
    assert (p[4, -2:] == 0).all() and 0.3 < (p[4] > 0.5).float().mean() < 0.9 and p.dtype == dtype
    assert all(v.isfinite().all() for v in found.extras().values())


@pytest.mark.parametrize("fit", [X.fit_gaussians, X.fit_betas])
def test_too_few_and_too_near(fit):
    x = heaps(1, n=60)[None]
    assert fit(x, min_count=61).posterior(x).eq(1).all() and not fit(x, min_count=30).whole.any()
    assert fit(x, min_gap=5.0).posterior(x).eq(1).all() and not fit(x, min_gap=0.1).whole.any()


def test_two_points_and_an_outlier():
    x = torch.tensor([[0.0, 1.0]])
    assert X.fit_gaussians(x).posterior(x)[0, 0] > 0.9 > 0.1 > X.fit_gaussians(x).posterior(x)[0, 1]
    clean = torch.zeros(1, 1000)
    clean[0, 17] = 1
    p = X.fit_gaussians(clean).posterior(clean)
    assert p[0, 17] < 1e-6 and (p[0] > 0.999).sum() == 999


def test_a_large_offset_costs_nothing():
    x = shapes()[:4]
    a, b = X.fit_gaussians(x), X.fit_gaussians(x + 1e4)
    torch.testing.assert_close(a.posterior(x), b.posterior(x + 1e4), atol=1e-6, rtol=0)


def slow_betas(losses, iterations):
    low, high = np.percentile(losses, [5, 95])
    x = losses[(losses >= low) & (losses <= high)]
    x = np.clip((x - low - 1e-5) / (high - low - 1e-5 + 1e-6), 1e-3, 1 - 1e-3)
    components = [[0.5, 1.0, 2.0], [0.5, 2.0, 1.0]]
    for _ in range(iterations):
        r = np.array([np.maximum(w * stats.beta(a, b).pdf(x), 1e-12) for w, a, b in components])
        r /= r.sum(0)
        for k, part in enumerate(r):
            m = np.average(x, weights=part)
            s2 = np.average((x - m) ** 2, weights=part)
            a = m * (m * (1 - m) / s2 - 1)
            components[k] = [part.mean(), a, a * (1 - m) / m]
    return np.array(components), low, high


def slow_posterior(values, components, low, high, how):
    "One value after another; the densities of the grid are computed once."
    def noisy(t):
        clean, wrong = (np.maximum(w * stats.beta.pdf(t, a, b), 1e-12) for w, a, b in components)
        return wrong / (clean + wrong)
    grid = np.linspace(1e-4, 1 - 1e-4, 100)
    table, found = noisy(grid), []
    peak = int(np.argmax(table))
    for value in values:
        x = min(max((value - low - 1e-5) / (high - low - 1e-5 + 1e-6), 1e-3), 1 - 1e-3)
        found.append(1 - (table[min(int(x * 100), 99, peak)] if how == "table"
                          else noisy(min(x, grid[peak]))))
    return found


@pytest.mark.parametrize("iterations", [1, 10, 40])
@pytest.mark.parametrize("how", ["exact", "table"])
def test_betas_by_a_slow_loop(iterations, how):
    rng = np.random.default_rng(1)
    x = torch.tensor(np.stack([np.r_[rng.gamma(k + 1, 0.2, 250), rng.normal(3, 0.6, 150)] for k in range(4)]))
    fit = X.fit_betas(x, max_iter=iterations)
    for k, row in enumerate(x.numpy()):
        components, low, high = slow_betas(row, iterations)
        order = (components[:, 1] / components[:, 1:].sum(1)).argsort()
        np.testing.assert_allclose(torch.stack((fit.weights, fit.a, fit.b), 2)[k], components[order],
                                   rtol=1e-6)
        expected = slow_posterior(row[::7], components[order], low, high, how)
        np.testing.assert_allclose(fit.posterior(x, how)[k, ::7], expected, atol=1e-6)


def test_betas_stay_finite_and_monotone():
    rng = np.random.default_rng(2)
    x = torch.tensor(np.stack([rng.exponential(1, 300), rng.integers(0, 2, 300).astype(float),
                               rng.normal(5, 1e-3, 300)]))
    for fit in (X.fit_betas(x), X.fit_betas(x, max_iter=200)):
        assert all(v.isfinite().all() for v in fit.extras().values())
        p = fit.posterior(x)
        assert ((p >= 0) & (p <= 1)).all() and (p[0, x[0].argsort()][200:].diff() <= 1e-9).all()


def test_extras_have_the_units_of_the_values():
    x = torch.stack([heaps(1) * 10])
    g, b = X.fit_gaussians(x, reg_covar=1e-6).extras(), X.fit_betas(x).extras()
    for extras in (g, b):
        assert all(extras[f"mixture_{k}"].shape == (1, 2) for k in ("weights", "means", "scales"))
        np.testing.assert_allclose(extras["mixture_means"][0], [1.5, 6.0], atol=1.2)
    np.testing.assert_allclose(g["mixture_scales"][0], [0.5, 1.5], atol=0.2)
    assert b["mixture_range"].shape == (2,) and b["mixture_a"].shape == b["mixture_b"].shape == (1, 2)


def test_rows_by_group():
    g = torch.Generator().manual_seed(0)
    values, groups = torch.rand(100, generator=g), torch.randint(7, (100,), generator=g)
    groups[groups == 3] = 4
    rows, place = X.to_rows(values, groups, 7)
    assert torch.equal(rows[groups, place], values) and rows[3].isnan().all()
    for k in range(7): assert torch.equal(rows[k][rows[k].isfinite()], values[groups == k])
    p = X.fit_gaussians(rows).posterior(rows)[groups, place]
    for k in (0, 4):
        alone = X.fit_gaussians(values[groups == k][None].double())
        torch.testing.assert_close(p[groups == k].double(),
                                   alone.posterior(values[groups == k][None].double())[0],
                                   atol=1e-6, rtol=0)
    assert X.to_rows(values[:0], groups[:0], 2)[0].shape == (2, 1)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 0), (1, 2, 3)])
def test_shapes_that_are_refused(shape):
    with pytest.raises(BadInput, match="accepted: .groups, samples."): X.fit_gaussians(torch.zeros(shape))


def test_an_unknown_way_is_refused():
    x = heaps(0)[None]
    with pytest.raises(BadInput, match="accepted: exact, table"): X.fit_betas(x).posterior(x, "lookup")
