"""The classes of mixing matrices, generators and points: one table, the same laws for all."""

import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from liegroup_attn import metrics
from liegroup_attn.errors import DtypeError, GeneratorError, ShapeError
from liegroup_attn.manifolds import ManifoldParameter, RateMatrices, Sphere

B, H, N = 6, 2, 5


def draw(seed=0):
    """What all of them may ask for, (B, H, N, N) in float64; each matrix of a size of its own."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, H, N, N, generator=rng, dtype=torch.float64)
    S = (3 * scores).softmax(-1)
    rates = S * (1 - torch.eye(N, dtype=torch.float64)) * torch.arange(1, B + 1)[:, None, None, None]
    Q = rates - torch.diag_embed(rates.sum(-1))
    P = torch.matrix_exp(Q)
    drift = torch.diag_embed(torch.rand(B, H, N, generator=rng, dtype=torch.float64))
    time = torch.rand(B, H, generator=rng, dtype=torch.float64)
    return {"transition": P * (1 + 1e-3 * drift), "jump_chain": S, "generator": Q, "time": time, "x": Q + drift}


def entropy(transition):
    return [-sum(p * math.log(p) for p in row if p > 0) for row in transition]


def row_error(transition):
    return [np.abs(transition.sum(-1) - 1).max()]


def rank(transition):
    s = scipy.linalg.svdvals(transition)
    return [math.exp(-sum(x * math.log(x) for x in s / s.sum()))]


def distance(transition, jump_chain):
    return [np.abs(transition - jump_chain).sum() / 2 / len(transition)]


def hops(generator, time):
    block = np.zeros((N + 1, N + 1))
    block[:N, :N], block[:N, N] = time * generator, -time * np.diag(generator)
    return scipy.linalg.expm(block)[:N, N]


def random_hops(generator, time):
    return np.linalg.solve(np.eye(N) - time * generator, -time * np.diag(generator))


def rest(generator):
    left = scipy.linalg.null_space(generator.T)[:, 0]
    return left / left.sum()


def gap(generator):
    return [np.sort(-scipy.linalg.eigvals(generator).real)[1]]


def mixing_time(generator, tol):
    def late(t):
        return np.abs(scipy.linalg.expm(t * generator) - rest(generator)).sum(-1).max() / 2 - tol

    return [scipy.optimize.brentq(late, 0, 100, xtol=1e-12)]


def imbalance(generator):
    flow = rest(generator)[:, None] * generator
    return [np.abs(flow - flow.T).max()]


def off(x):
    rates = x * (1 - np.eye(N))
    return [(np.abs(np.diag(x) + rates.sum(-1)) / np.maximum(1, np.abs(np.diag(x)))).max()]


# name: (how it is made, its arguments, the numbers of one matrix in NumPy, how they are put together)
CASES = {
    "entropy": (metrics.AttentionEntropy, ("transition",), entropy, np.mean),
    "row error": (metrics.RowStochasticityError, ("transition",), row_error, np.max),
    "rank": (metrics.EffectiveRank, ("transition",), rank, np.mean),
    "sink": (metrics.SinkMass, ("transition",), lambda P: [P.mean(0).max()], np.mean),
    "sink 0": (lambda: metrics.SinkMass([0, -1]), ("transition",), lambda P: [P[:, [0, -1]].sum() / N], np.mean),
    "distance": (metrics.DistanceToSoftmax, ("transition", "jump_chain"), distance, np.mean),
    "hops": (metrics.ExpectedHops, ("generator", "time"), hops, np.mean),
    "random hops": (lambda: metrics.ExpectedHops(exponential=True), ("generator", "time"), random_hops, np.mean),
    "gap": (metrics.SpectralGap, ("generator",), gap, np.mean),
    "mixing": (metrics.MixingTime, ("generator",), lambda Q: mixing_time(Q, 0.25), np.mean),
    "mixing to a tenth": (lambda: metrics.MixingTime(0.1), ("generator",), lambda Q: mixing_time(Q, 0.1), np.mean),
    "rest": (metrics.StationaryMass, ("generator",), lambda Q: [rest(Q).max()], np.mean),
    "rest 2": (lambda: metrics.StationaryMass(2), ("generator",), lambda Q: [rest(Q)[2]], np.mean),
    "imbalance": (metrics.DetailedBalanceResidual, ("generator",), imbalance, np.mean),
    "off": (lambda: metrics.OffManifoldDistance(RateMatrices(N)), ("x",), off, np.max),
}
WORST = ("row error", "off")
GENERATORS = ("gap", "mixing", "rest", "imbalance", "hops")
names = pytest.mark.parametrize("name", CASES)


def make(name, dtype=torch.float32):
    return CASES[name][0]().set_dtype(dtype)


def arguments(name, data, rows=slice(None)):
    return {key: data[key][rows] for key in CASES[name][1]}


def golden(name, data):
    _, keys, numbers, together = CASES[name]
    items = [data[key].flatten(0, 1).numpy() for key in keys]
    return together([number for item in zip(*items, strict=True) for number in numbers(*item)])


def of(name, *batches):
    metric = make(name)
    for batch in batches:
        metric.update(**batch)
    return metric.compute()


@names
def test_value_and_every_matrix_weighs_the_same(name):
    data = draw()
    expected = golden(name, data)
    for cuts in ([0, 6], [0, 1, 4, 6], [0, 4, 4, 6]):  # a mean of means would differ; an empty batch counts nothing
        metric = make(name, torch.float64)
        for start, stop in itertools.pairwise(cuts):
            metric.update(**arguments(name, data, slice(start, stop)))
        assert metric.compute().shape == ()
        assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
    assert of(name, arguments(name, data)).dtype == torch.float32
    assert of(name, arguments(name, data)).item() == pytest.approx(expected, rel=1e-6)


@names
def test_reset_and_other_data(name):
    metric = make(name)
    metric.update(**arguments(name, draw()))
    before = metric.compute()
    metric.reset()
    metric.update(**arguments(name, draw(1)))
    assert metric.compute() != before
    assert metric.compute() == of(name, arguments(name, draw(1)))


@names
def test_forward_returns_the_batch_and_accumulates(name):
    data, metric = draw(), make(name)
    first, last = arguments(name, data, slice(0, 2)), arguments(name, data, slice(2, 6))
    torch.testing.assert_close(metric(**first), of(name, first))
    torch.testing.assert_close(metric(**last), of(name, last))
    torch.testing.assert_close(metric.compute(), of(name, arguments(name, data)))


@names
def test_forward_has_a_gradient_where_it_says_so(name):
    batch = {key: value.clone().requires_grad_() for key, value in arguments(name, draw()).items()}
    metric = make(name)
    value = metric(**batch)
    assert value.requires_grad == metric.is_differentiable
    if metric.is_differentiable:
        value.backward()
        assert all(x.grad.isfinite().all() and x.grad.any() for x in batch.values())


@names
def test_pickle_and_clone_keep_the_counts_apart(name):
    data, metric = draw(), make(name)
    metric.update(**arguments(name, data, slice(0, 2)))
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        before = metric.compute()
        assert copy.compute() == before
        copy.update(**arguments(name, data, slice(2, 6)))
        torch.testing.assert_close(copy.compute(), of(name, arguments(name, data)))
        assert metric.compute() == before


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    batch = {key: value.to(dtype) for key, value in arguments(name, draw()).items()}
    got = of(name, batch)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(golden(name, draw()), rel=0.02, abs=4 * torch.finfo(dtype).eps)


@names
def test_nothing_is_nan(name):
    empty = arguments(name, draw(), slice(0, 0))
    assert of(name, empty).isnan()
    assert of(name, empty, arguments(name, draw()), empty) == of(name, arguments(name, draw()))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert make(name).compute().isnan()


@names
def test_nan_is_passed_on_and_raises_nothing(name):
    data = draw()
    clean = arguments(name, draw(1))
    for key in set(CASES[name][1]) - {"time"}:
        data[key][3, 1, 0, 1] = math.nan
    got = of(name, clean, arguments(name, data), clean)
    assert got.isnan() == (name != "sink 0")  # NaN is in column 1, where that one does not look
    assert of(name, clean, arguments(name, data, slice(0, 3))).isfinite()


def _accumulate(rank, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    data, results = draw(), {}
    for name in CASES:
        metric = make(name)
        for rows in ((slice(0, 1), slice(1, 2)), (slice(2, 6), slice(0, 0)))[rank]:  # unequal shares
            metric.update(**arguments(name, data, rows))
        results[name] = metric.compute()
        metric.update(**arguments(name, draw(1)))  # states are the rank's own again after a synchronized compute
        results[name + " again"] = metric.compute()
        one_sided = make(name)
        one_sided.update(**arguments(name, data, slice(0, 6 if rank else 0)))
        results[name + " of one"] = one_sided.compute()
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_accumulate, args=(tmp_path / "store", str(tmp_path / "out")), nprocs=2)
    data = draw()
    for rank in range(2):
        results = torch.load(f"{tmp_path}/out.{rank}")
        for name in CASES:
            batch, other = arguments(name, data), arguments(name, draw(1))
            torch.testing.assert_close(results[name], of(name, batch), msg=name)
            torch.testing.assert_close(results[name + " again"], of(name, batch, other, other), msg=name)
            torch.testing.assert_close(results[name + " of one"], of(name, batch), msg=name)


def test_one_collection_takes_all_of_them():
    together = MetricCollection({name: make(name) for name in CASES})
    together.update(**draw())
    together.update(**draw(1))
    for name, value in together.compute().items():
        torch.testing.assert_close(value, of(name, arguments(name, draw()), arguments(name, draw(1))), msg=name)


def test_a_collection_never_takes_two_of_them_for_one():
    """torchmetrics updates one of two metrics whose states agree after the first batch; here all are 0, or all are ½."""
    still, half = torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5)
    first = {"transition": half, "jump_chain": half, "generator": still, "x": still}
    then = {key: value[:, :1] for key, value in draw().items()}
    kinds = {
        "distance": metrics.DistanceToSoftmax,
        "hops": metrics.ExpectedHops,
        "random hops": lambda: metrics.ExpectedHops(True),
        "gap": metrics.SpectralGap,
        "sink": metrics.SinkMass,
        "sink 0": lambda: metrics.SinkMass(0),
        "sink 1": lambda: metrics.SinkMass(1),
        "sink -1": lambda: metrics.SinkMass(-1),
        "row error": metrics.RowStochasticityError,
    }
    together = MetricCollection({name: kind() for name, kind in kinds.items()})
    together.update(**first)
    together.update(**then)
    for name, value in together.compute().items():
        alone = kinds[name]()
        for data in (first, then):
            alone.update(**alone._filter_kwargs(**data))
        torch.testing.assert_close(value, alone.compute(), msg=name)


@names
def test_plot(name):
    import matplotlib.figure

    metric = make(name)
    metric.update(**arguments(name, draw()))
    ax = matplotlib.figure.Figure().add_subplot()
    _, drawn = metric.plot(ax=ax)
    assert drawn is ax
    assert ax.lines


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_no_generator(name):
    for bad, error in (
        (torch.tensor([[1.0, -1.0], [1.0, -1.0]]), GeneratorError),
        (torch.zeros(2, 3), ShapeError),
        (torch.zeros(2, 2, dtype=torch.long), DtypeError),
    ):
        metric = make(name)
        with pytest.raises(error, match=r"generator: expected .*got .*; "):
            metric.update(bad)


# A chain that ends at its first token, one that never moves, two chains beside each other.
CAUSAL = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
FROZEN = torch.zeros(3, 3, dtype=torch.float64)
APART = torch.block_diag(torch.zeros(1, 1), torch.tensor([[-1.0, 1.0], [3.0, -3.0]])).double()


@pytest.mark.parametrize(
    ("name", "causal", "several"),
    [
        ("gap", 2.0, 0.0),
        ("mixing", mixing_time(CAUSAL.numpy(), 0.25)[0], math.inf),
        ("rest", 1.0, math.nan),
        ("imbalance", 0.0, math.nan),
    ],
)
def test_absorbing_states_and_several_closed_classes(name, causal, several):
    metric = make(name)
    metric.update(CAUSAL)
    assert metric.compute().item() == pytest.approx(causal, rel=1e-6)
    for Q in (FROZEN, APART):
        assert of(name, {"generator": Q}).item() == pytest.approx(several, nan_ok=True)
        mixed = of(name, {"generator": torch.stack([CAUSAL, Q])}).item()
        assert mixed == pytest.approx((causal + several) / 2, nan_ok=True)


def test_a_single_state_has_no_slow_mode():
    assert of("gap", {"generator": torch.zeros(1, 1)}) == math.inf
    assert of("mixing", {"generator": torch.zeros(1, 1)}) == 0


def test_mixing_that_rounding_hides_is_nan(monkeypatch):
    from liegroup_attn.errors import ConvergenceError
    from liegroup_attn.metrics import of_generators

    exact, seen = metrics.mixing_time, []

    def stubborn(generator, tol):
        seen.append(generator.shape)
        if bool((generator.diagonal(dim1=-2, dim2=-1) < -8).any()):
            raise ConvergenceError("rounding")
        return exact(generator, tol)

    monkeypatch.setattr(of_generators, "mixing_time", stubborn)
    Q = draw()["generator"][0]
    found = of_generators._mixing_time(torch.stack([Q, 100 * Q]), 0.25)
    torch.testing.assert_close(found[0], exact(Q))
    assert found[1].isnan().all()
    assert seen[0] == (2, H, N, N)


def test_off_manifold_takes_the_manifold_of_a_parameter():
    metric = metrics.OffManifoldDistance()
    metric.update(ManifoldParameter(torch.tensor([2.0, 0.0]), manifold=Sphere()))
    assert metric.compute() == 0.5
    metric.update(ManifoldParameter(torch.tensor([[-1.0, 1.0], [2.0, -8.0]]), manifold=RateMatrices(2)))
    assert metric.compute() == 0.75
    with pytest.raises(GeneratorError, match=r"manifold: expected one, got none .*; give"):
        metric.update(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"x: expected a point on .*, got shape .*; "):
        metrics.OffManifoldDistance(RateMatrices(2)).update(torch.zeros(3, 3))
    with pytest.raises(DtypeError):
        metrics.SinkMass(0.5)
    with pytest.raises(GeneratorError, match=r"tol: expected 0 < tol < 1, got 1; "):
        metrics.MixingTime(1)


def test_the_import_brings_no_geoopt():
    code = "import sys, liegroup_attn.metrics; print('geoopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
