import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.classification import MulticlassAccuracy as TorchmetricsAccuracy
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from liegroup_attn import metrics
from liegroup_attn.errors import ShapeError
from liegroup_attn.metrics import AccuracyByDepth, BitsPerByte

B, N, V, DEEPEST = 6, 11, 7, 4


def draw(seed=0):
    """preds (B, N, V), target (B, N), depth (B, N); no token at depth 2, some targets ignored."""
    rng = torch.Generator().manual_seed(seed)
    preds = torch.randn(B, N, V, generator=rng)
    target = torch.randint(V, (B, N), generator=rng)
    depth = torch.tensor([0, 1, 3, 4])[torch.randint(4, (B, N), generator=rng)]
    target[torch.rand(B, N, generator=rng) < 0.2] = -100
    return preds, target, depth


def golden_bits(preds, target):
    preds, target = preds.double().numpy(), target.numpy()
    log_p = preds - np.log(np.exp(preds).sum(-1, keepdims=True))
    return -np.mean([log_p[i][t] / np.log(2) for i, t in np.ndenumerate(target) if t != -100])


def golden_accuracy(preds, target, depth):
    right, depth = (preds.argmax(-1) == target).numpy(), depth.numpy()
    kept = target.numpy() != -100
    with np.errstate(invalid="ignore"):
        by_depth = [
            np.divide(right[kept & (depth == d)].sum(), (kept & (depth == d)).sum()) for d in range(DEEPEST + 1)
        ]
    return np.array(by_depth), right[kept].mean()


def make(name):
    return BitsPerByte() if name == "bits" else AccuracyByDepth(DEEPEST)


def arguments(name, data, rows=slice(None)):
    return [entry[rows] for entry in (data[:2] if name == "bits" else data)]


names = pytest.mark.parametrize("name", ["bits", "depth"])


def test_bits_value():
    preds, target, _ = draw()
    metric = BitsPerByte()
    metric.update(preds, target)
    assert metric.compute().item() == pytest.approx(golden_bits(preds, target), rel=1e-6)
    perplexity = metrics.Perplexity(ignore_index=-100)
    assert metric.compute() == pytest.approx(math.log2(perplexity(preds, target)), rel=1e-5)


def test_bits_of_a_sure_miss_are_finite_and_half_inputs_are_upcast():
    metric = BitsPerByte()
    metric.update(torch.tensor([[[1000.0, 0.0]]]).bfloat16(), torch.tensor([[1]]))
    assert metric.compute().item() == pytest.approx(1000 / math.log(2))
    metric.update(torch.full((1, 4096, 2), 0.0).half(), torch.zeros(1, 4096, dtype=torch.long))  # a sum over 2048
    assert metric.compute().item() == pytest.approx((1000 / math.log(2) + 4096) / 4097)


def test_accuracy_value():
    preds, target, depth = draw()
    metric = AccuracyByDepth(DEEPEST)
    metric.update(preds, target, depth)
    by_depth, overall = golden_accuracy(preds, target, depth)
    assert np.isnan(by_depth[2])
    np.testing.assert_allclose(metric.compute(), by_depth, rtol=1e-6)
    assert metric.overall().item() == pytest.approx(overall)
    plain = metrics.MulticlassAccuracy(V, average="micro", ignore_index=-100)
    assert metric.overall() == pytest.approx(plain(preds.flatten(0, 1), target.flatten()))


def test_accuracy_takes_classes_or_scores():
    preds, target, depth = draw()
    by_scores, by_classes = AccuracyByDepth(DEEPEST), AccuracyByDepth(DEEPEST)
    by_scores.update(preds, target, depth)
    by_classes.update(preds.argmax(-1), target, depth)
    torch.testing.assert_close(by_scores.compute(), by_classes.compute(), equal_nan=True)


@names
def test_batches_equal_one_update(name):
    data = draw()
    whole, parts = make(name), make(name)
    whole.update(*arguments(name, data))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # unequal batches: a mean of means would differ
        parts.update(*arguments(name, data, rows))
    torch.testing.assert_close(parts.compute(), whole.compute(), equal_nan=True)
    parts.reset()
    parts.update(*arguments(name, draw(1)))
    assert not torch.equal(parts.compute().nan_to_num(), whole.compute().nan_to_num())


@names
def test_forward_returns_the_batch_and_accumulates(name):
    data = draw()
    metric, first, whole = make(name), make(name), make(name)
    first.update(*arguments(name, data, slice(0, 2)))
    whole.update(*arguments(name, data))
    torch.testing.assert_close(metric(*arguments(name, data, slice(0, 2))), first.compute(), equal_nan=True)
    metric(*arguments(name, data, slice(2, 6)))
    torch.testing.assert_close(metric.compute(), whole.compute(), equal_nan=True)


@names
def test_pickle_and_clone_keep_the_counts_apart(name):
    data = draw()
    metric = make(name)
    metric.update(*arguments(name, data))
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert torch.equal(copy.compute().nan_to_num(-1), metric.compute().nan_to_num(-1))
        before = metric.compute()
        copy.update(*arguments(name, draw(1)))
        assert not torch.equal(copy.compute().nan_to_num(-1), metric.compute().nan_to_num(-1))
        torch.testing.assert_close(metric.compute(), before, equal_nan=True)


@names
def test_nothing_counted_is_nan(name):
    preds, target, depth = draw()
    metric = make(name)
    metric.update(*arguments(name, (preds, torch.full_like(target, -100), depth)))
    assert metric.compute().isnan().all()


def _accumulate(rank, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    data = draw()
    results = {}
    for name in ("bits", "depth"):
        metric = make(name)
        for rows in ((slice(0, 1), slice(1, 2)), (slice(2, 6),))[rank]:  # unequal shares
            metric.update(*arguments(name, data, rows))
        if name == "depth":
            results["overall"] = metric.overall()
        results[name] = metric.compute()
        metric.update(*arguments(name, data))  # states are the rank's own again after a synchronized compute
        results[name + " again"] = metric.compute()
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_accumulate, args=(tmp_path / "store", str(tmp_path / "out")), nprocs=2)
    data = draw()
    for rank in range(2):
        results = torch.load(f"{tmp_path}/out.{rank}")
        for name in ("bits", "depth"):
            metric = make(name)
            metric.update(*arguments(name, data))
            torch.testing.assert_close(results[name], metric.compute(), equal_nan=True)
            torch.testing.assert_close(results[name + " again"], metric.compute(), equal_nan=True)
            if name == "depth":
                torch.testing.assert_close(results["overall"], metric.overall())


@pytest.mark.parametrize("depth", [DEEPEST + 1, -1])
def test_depth_out_of_range(depth):
    preds, target, depths = draw()
    depths[0, 0], target[0, 0] = depth, 0
    metric = AccuracyByDepth(DEEPEST)
    with pytest.raises(ValueError, match=r"depth: expected 0 … 4, got .*; raise max_depth"):
        metric.update(preds, target, depths)
    assert metric.total.sum() == 0
    target[0, 0] = -100  # an ignored token may have any depth
    metric.update(preds, target, depths)
    with pytest.raises(ValueError, match="max_depth: expected"):
        AccuracyByDepth(-1)


@pytest.mark.parametrize("shapes", [((2, 3, 7), (2, 4), (2, 4)), ((2, 3), (2, 3), (2, 1)), ((3, 2), (2, 3), (2, 3))])
def test_shapes_that_do_not_go_together(shapes):
    preds, target, depth = (torch.zeros(shape, dtype=torch.long) for shape in shapes)
    with pytest.raises(ShapeError, match=r"expected .*got .*; "):
        AccuracyByDepth(DEEPEST).update(preds, target, depth)
    with pytest.raises(ShapeError, match=r"expected .*got .*; "):
        BitsPerByte().update(preds.float(), target)


@names
def test_plot(name):
    import matplotlib.figure

    metric = make(name)
    metric.update(*arguments(name, draw()))
    ax = matplotlib.figure.Figure().add_subplot()
    figure, drawn = metric.plot(ax=ax)
    assert drawn is ax
    assert figure is None or figure is ax.figure  # torchmetrics returns no figure for axes it was given
    assert ax.lines


def test_torchmetrics_own():
    assert metrics.Perplexity is TorchmetricsPerplexity
    assert metrics.MulticlassAccuracy is TorchmetricsAccuracy
