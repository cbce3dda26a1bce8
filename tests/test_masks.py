"""Which masks exp(tQ) keeps: the library's verdict against brute-force reachability."""

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import MASKS, attention
from hypothesis import given
from hypothesis import strategies as st

import liegroup_attn as la
from liegroup_attn.errors import MaskError
from liegroup_attn.masks import check_closed, read_mask
from liegroup_attn.visible import Causal


def _accepts(mask: torch.Tensor, is_causal: bool = False) -> bool:
    visible, _ = read_mask(mask, torch.float32)
    try:
        check_closed(Causal() & visible if is_causal else visible, mask.size(-1))
    except MaskError:
        return False
    return True


def _keeps(mask: np.ndarray) -> bool:
    """Floyd–Warshall: every token reached in any number of hops is allowed; who is seen and looks on sees itself."""
    n = len(mask)
    reach = mask & ~np.eye(n, dtype=bool)
    onward = reach.copy()
    for k in range(n):
        reach |= np.outer(reach[:, k], reach[k])
    leaks = reach & ~mask & ~np.eye(n, dtype=bool)
    hidden_from_itself = onward.any(0) & mask.any(1) & ~mask.diagonal()
    return not leaks.any() and not hidden_from_itself.any()


def _matrices(smallest=1, largest=5):
    return st.integers(smallest, largest).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n).map(np.array)
    )


def _closed(mask: np.ndarray) -> np.ndarray:
    reach = mask | np.eye(len(mask), dtype=bool)
    for k in range(len(mask)):
        reach |= np.outer(reach[:, k], reach[k])
    return reach


@given(_matrices())
def test_verdict_is_that_of_brute_force(mask):
    assert _accepts(torch.tensor(mask)) == _keeps(mask)


@given(_matrices())
def test_beside_a_causal_mask_both_are_one(mask):
    both = np.tril(mask)
    assert _accepts(torch.tensor(mask), is_causal=True) == _keeps(both)


@given(_matrices())
def test_verdict_on_reflexive_masks(mask):
    """Random masks are hardly ever closed; with the diagonal set more of them are."""
    mask = mask | np.eye(len(mask), dtype=bool)
    assert _accepts(torch.tensor(mask)) == (mask == _closed(mask)).all()


@given(_matrices())
def test_closures_are_accepted(mask):
    assert _accepts(torch.tensor(_closed(mask)))


@given(_matrices(2))
def test_float_masks_get_the_verdict_of_their_bool(mask):
    bias = torch.zeros(mask.shape).masked_fill(~torch.tensor(mask), -torch.inf)
    assert _accepts(bias) == _accepts(torch.tensor(mask))


@given(_matrices(2, 4), _matrices(2, 4))
def test_one_leak_in_a_batch_is_found(a, b):
    n = min(len(a), len(b))
    both = torch.tensor(np.stack([a[:n, :n], b[:n, :n]]))
    assert _accepts(both) == (_keeps(a[:n, :n]) and _keeps(b[:n, :n]))
    assert _accepts(both[:, None]) == _accepts(both)


@given(_matrices())
def test_what_is_accepted_does_not_leak_and_what_is_refused_does(mask):
    """The verdict's meaning: off the diagonal, exp(tQ) is positive at most where the mask allows."""
    rates = np.where(mask, 1.0, 0.0)
    np.fill_diagonal(rates, 0)
    mixing = scipy.linalg.expm(rates - np.diag(rates.sum(1)))
    leaks = (mixing > 1e-9) & ~mask & ~np.eye(len(mask), dtype=bool)
    if _accepts(torch.tensor(mask)):
        assert not leaks.any()
    elif mask.diagonal().all():
        assert leaks.any()


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_key_padding_is_accepted_in_every_shape(keep):
    keep, n = torch.tensor(keep), len(keep)
    assert _accepts(keep[None, None, None, :])
    assert _accepts(keep.expand(n, n))  # spelled out
    assert _accepts(keep[:, None] & keep)  # rows too


@pytest.mark.parametrize("name", list(MASKS))
def test_the_masks_of_the_table_are_closed(name):
    attn_mask, _ = MASKS[name](2, 2, 12, torch.float32)
    assert attn_mask is None or _accepts(attn_mask)


OPEN = {
    "sliding window": torch.ones(6, 6, dtype=torch.bool).tril().triu(-2),
    "window both ways": torch.ones(6, 6, dtype=torch.bool).tril(1).triu(-1),
    "strictly causal": torch.ones(6, 6, dtype=torch.bool).tril(-1),
    "dilated": (torch.arange(6)[:, None] - torch.arange(6)).abs() % 4 < 2,
    "others only": ~torch.eye(6, dtype=torch.bool),
}


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("knobs", [{}, {"first_hop": True}, {"rate_fn": la.softplus}, {"method": la.MatrixExp()}])
def test_open_masks_are_refused_unless_allowed_by_name(name, knobs):
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(MaskError, match="allow_open_mask=True"):
        la.lie_attention(q, q, q, OPEN[name], **knobs)
    out = attention(q, q, q, OPEN[name], allow_open_mask=True, **knobs)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", OPEN)
def test_without_hops_nothing_leaks_so_nothing_is_refused(name):
    q = torch.randn(1, 2, 6, 4)
    assert torch.equal(la.lie_attention(q, q, q, OPEN[name], time=0.0), q)
    la.lie_attention(q, q, q, OPEN[name], time=0.0, first_hop=True)


def test_the_message_names_the_leak():
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    with pytest.raises(MaskError, match="token 2 reaches token 0 by way of token 1"):
        check_closed(window)


def test_an_open_mask_fills_its_closure():
    q = torch.randn(1, 5, 4, dtype=torch.float64)
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    eye = torch.eye(5, dtype=torch.float64)[None]
    mixing = attention(q, q, eye, window, allow_open_mask=True)
    assert torch.equal(mixing > 0, torch.ones(1, 5, 5).tril() > 0)
