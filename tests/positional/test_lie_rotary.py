"""Learned rotations against SciPy's exponentials, their special cases, folds, memory, gradients and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liegroup_attn.errors import DtypeError, ShapeError
from liegroup_attn.manifolds import SpecialOrthogonal, off_manifold
from liegroup_attn.nn import LieAttention, SoftmaxAttention, SpectralScores, fold_encoding
from liegroup_attn.positional import (
    ALiBi,
    AxialBlocks,
    BlockExponential,
    CayleyString,
    CirculantString,
    DependentBlocks,
    FoldedRotary,
    HeadRotation,
    LieRotary,
    PlaneRotary,
    RotaryEncoding,
    grid_positions,
    rodrigues,
)
from liegroup_attn.positional.blocks import skew_blocks
from liegroup_attn.positional.one_parameter import one_parameter_rotations

D, H, N = 12, 2, 7
COMMUTING = {
    "lie, 1 axis": lambda heads=H: LieRotary(D, heads, block=4),
    "lie, odd blocks": lambda heads=H: LieRotary(D, heads, block=3),
    "lie, dense": lambda heads=H: LieRotary(D, heads, block=D),
    "lie, planes, 2 axes": lambda heads=H: LieRotary(D, heads, axes=2, block=2),
    "axial": lambda heads=H: AxialBlocks(D, heads, axes=2, block=4),
    "axial, odd blocks": lambda heads=H: AxialBlocks(D, heads, axes=3, block=3),
    "dependent": lambda heads=H: DependentBlocks(D, heads, axes=2, block=4),
    "dependent, odd blocks": lambda heads=H: DependentBlocks(D, heads, axes=2, block=3),
    "cayley": lambda heads=H: CayleyString(D, heads),
    "cayley, 2 axes": lambda heads=H: CayleyString(D, heads, axes=2),
    "circulant": lambda heads=H: CirculantString(D, heads),
    "circulant, 3 axes": lambda heads=H: CirculantString(D, heads, axes=3),
    "planes": lambda heads=H: PlaneRotary(D, heads),
    "planes, 2 axes": lambda heads=H: PlaneRotary(D, heads, num_planes=4, axes=2),
    "planes, full": lambda heads=H: PlaneRotary(D, heads, num_planes=D // 2, axes=2),
}
BUILD = COMMUTING | {"lie, 2 axes": lambda heads=H: LieRotary(D, heads, axes=2, block=4)}
every = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
commuting = pytest.mark.parametrize("build", COMMUTING.values(), ids=COMMUTING.keys())


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(build, heads: int = H):
    """In float64, every parameter away from its start, but on its manifold."""
    torch.manual_seed(2)
    encoding = build(heads).double()
    with torch.no_grad():
        for parameter in encoding.parameters():
            moved = parameter + 0.2 * torch.randn_like(parameter)
            parameter.copy_(parameter.manifold.projx(moved) if hasattr(parameter, "manifold") else moved)
    return encoding


def places(encoding, tokens: int = N) -> torch.Tensor:
    count = torch.arange(tokens)
    return count if encoding.axes == 1 else torch.stack([count * (p + 2) % 5 - p for p in range(encoding.axes)], -1)


def generators(encoding) -> torch.Tensor:
    """A_p written out as matrices, (H, P, D, D), by another road than the encoding's."""
    if isinstance(encoding, PlaneRotary):
        first, second = encoding.frame.detach().chunk(2, -1)
        return torch.einsum("hkp,hik,hjk->hpij", encoding.frequencies, second, first) - torch.einsum(
            "hkp,hik,hjk->hpij", encoding.frequencies, first, second
        )
    if isinstance(encoding, CirculantString):
        column, zero = encoding.column.detach(), torch.zeros(H, encoding.axes, 1)
        full = torch.cat([zero, column, zero, -column.flip(-1)], -1).numpy()
        return torch.tensor(np.array([[scipy.linalg.circulant(c) for c in head] for head in full]))
    if isinstance(encoding, CayleyString):
        turns = torch.zeros(H, encoding.axes, D, D, dtype=torch.float64)
        for i in range(D // 2):
            turns[:, :, i + D // 2, i] = encoding.frequencies.detach()[:, i]
        skew, eye = skew_blocks(encoding.entries.detach(), D), torch.eye(D)
        basis = torch.linalg.inv(eye + skew) @ (eye - skew)
        return (basis.unsqueeze(1) @ (turns - turns.mT)) @ basis.mT.unsqueeze(1)
    blocks = encoding.generators(torch.float64).detach()
    return torch.stack([torch.stack([torch.block_diag(*axis) for axis in head]) for head in blocks])


@every
def test_it_is_the_exponential_of_skew_generators(build):
    encoding = learned(build)
    A, at = generators(encoding).detach(), places(encoding)
    torch.testing.assert_close(A, -A.mT, atol=1e-14, rtol=0)
    positions = at.reshape(N, -1).double()
    for head in range(H):
        for n in range(N):
            golden = scipy.linalg.expm(torch.einsum("p,pij->ij", positions[n], A[head]).numpy())
            got = encoding.matrix(at)[head, n].detach().numpy()
            np.testing.assert_allclose(got, golden, atol=1e-11)


@commuting
def test_generators_commute_and_the_relative_law_holds(build):
    encoding = learned(build)
    A = generators(encoding)
    brackets = torch.einsum("hpij,hqjk->hpqik", A, A) - torch.einsum("hqij,hpjk->hpqik", A, A)
    assert brackets.abs().max() <= 1e-12
    x = places(encoding)
    y = x.flip(0) + 40
    products = encoding.matrix(x).mT @ encoding.matrix(y)
    assert (products - encoding.matrix(y - x)).abs().max() <= 1e-10
    assert encoding.relative


def test_the_relative_law_is_broken_by_blocks_that_do_not_commute():
    encoding = learned(BUILD["lie, 2 axes"])
    x = grid_positions(4, 4)
    y = x.flip(0)
    products = encoding.matrix(x).mT @ encoding.matrix(y)
    assert (products - encoding.matrix(y - x)).abs().max() > 0.5  # entries of rotations: as wrong as can be
    assert not encoding.relative


class LargestOfBatch(TorchDispatchMode):
    """The size of the largest tensor that an operation made: of all, and of those that have the batch's prime factor."""

    def __init__(self, prime: int) -> None:
        super().__init__()
        self.prime, self.of_batch, self.of_all = prime, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * (2 if tensor.is_complex() else 1)
                self.of_all = max(self.of_all, size)
                if tensor.numel() % self.prime == 0:
                    self.of_batch = max(self.of_batch, size)
        return out


@pytest.mark.parametrize("per_key", [1, 3])
@every
def test_no_matrix_is_made_for_every_token_of_a_batch(build, per_key):
    """Shared positions: forward and backward hold vectors for every item, but matrices once."""
    encoding, batch = learned(build), 5
    query = vectors(batch, H * per_key, N, D).requires_grad_()
    key = vectors(batch, H, N, D, seed=1).requires_grad_()
    with LargestOfBatch(batch) as seen:
        turned = encoding.rotate(query, key, places(encoding))
        (turned[0].square().sum() + (turned[1] ** 3).sum()).backward()
    room = 2 * D if isinstance(encoding, CirculantString) else D  # complex numbers are two
    assert query.numel() <= seen.of_batch <= query.numel() // D * room
    if not hasattr(encoding, "generators") and per_key == 1:  # closed forms: no matrix of any token
        assert seen.of_all < H * N * D * D


def test_the_watch_sees_a_matrix_for_every_token():
    encoding, query = learned(BUILD["lie, dense"]), vectors(5, H, N, D)
    with LargestOfBatch(5) as seen:
        encoding.matrix(places(encoding)) @ query.unsqueeze(-1)
    assert seen.of_batch > 5 * H * N * D


@every
def test_queries_and_keys_are_turned_by_one_r(build):
    encoding, at = learned(build), places(build())
    query, key = vectors(3, 3 * H, N, D), vectors(3, H, N, D, seed=1)
    turned = encoding.rotate(query, key, at)
    torch.testing.assert_close(turned[0], encoding(query, at), atol=1e-13, rtol=0)
    torch.testing.assert_close(turned[1], encoding(key, at), atol=1e-13, rtol=0)
    matrix = encoding.matrix(at).repeat_interleave(3, 0)
    golden = torch.einsum("hnij,bhnj->bhni", matrix, query)
    torch.testing.assert_close(turned[0], golden, atol=1e-12, rtol=0)
    # Positions of their own for every query head.
    apart = torch.stack([at + 2 * h for h in range(3 * H)])
    for h in range(3 * H):
        torch.testing.assert_close(encoding(query, apart)[:, h], encoding(query, apart[h])[:, h], atol=1e-12, rtol=0)


@every
def test_gradients_of_parameters_and_inputs(build):
    encoding = learned(build)
    at, x = places(encoding, 3), vectors(2, H, 3, D).requires_grad_()
    names = [name for name, _ in encoding.named_parameters()]
    values = [p.detach().as_subclass(torch.Tensor).clone().requires_grad_() for p in encoding.parameters()]

    def acted(x, *parameters):
        return torch.func.functional_call(encoding, dict(zip(names, parameters, strict=True)), (x, at))

    assert torch.autograd.gradcheck(acted, (x, *values), fast_mode=True)


@every
def test_every_head_block_and_axis_learns_from_the_start(build):
    torch.manual_seed(0)
    encoding = build()
    query, key = vectors(2, H, N, D).float(), vectors(2, H, N, D, seed=1).float()
    turned = encoding.rotate(query, key, places(encoding))
    (turned[0] @ turned[1].mT * vectors(N, N, seed=2).float()).sum().backward()
    for name, parameter in encoding.named_parameters():
        grad = parameter.grad.reshape(*parameter.shape[: max(1, min(2, parameter.dim() - 1))], -1)
        assert (grad.abs().amax(-1) > 0).all(), name


@every
def test_the_start_is_the_seeds(build):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in build().parameters()]))
    assert torch.equal(states[0], states[1])
    fixed = isinstance(build(), CayleyString | CirculantString) and build().axes == 1
    assert torch.equal(states[0], states[2]) == fixed


@commuting
def test_it_starts_at_ropes_frequencies(build):
    encoding = build().double()
    _, frequencies = encoding.planes()
    largest = frequencies.norm(dim=-1)
    torch.testing.assert_close(largest.amax(-1), torch.ones(H).double(), atol=1e-6, rtol=0)
    assert (largest <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    "frequencies", [[1.0, 0.4], [0.7, 0.7], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0 + 1e-9], [1.0, 1e-12]]
)
def test_derivatives_where_frequencies_meet(frequencies):
    """Eigenvectors have no derivative there; the exponential has."""
    frame, turns = torch.linalg.qr(vectors(4, 4)).Q, torch.zeros(4, 4, dtype=torch.float64)
    turns[[2, 3], [0, 1]] = torch.tensor(frequencies).double()
    row, column = torch.tril_indices(4, 4, -1)
    entries = (frame @ (turns - turns.T) @ frame.T)[row, column].requires_grad_()
    time = torch.tensor([0.0, 1.0, -2.5, 30.0], dtype=torch.float64, requires_grad=True)
    weight = vectors(4, 4, 4, seed=1)
    A = skew_blocks(entries, 4)
    rotations = one_parameter_rotations(A, time)
    golden = torch.matrix_exp(time[:, None, None] * A)
    torch.testing.assert_close(rotations, golden, atol=1e-12, rtol=0)
    got = torch.autograd.grad((rotations * weight).sum(), (entries, time), retain_graph=True)
    for one, two in zip(got, torch.autograd.grad((golden * weight).sum(), (entries, time)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(lambda e, t: one_parameter_rotations(skew_blocks(e, 4), t), (entries, time))


def test_rotations_of_single_items_by_vmap():
    encoding, x = learned(BUILD["axial"]), vectors(3, H, N, D)
    values = {name: p.detach() for name, p in encoding.named_parameters()}

    def loss(values, x):
        return (torch.func.functional_call(encoding, values, (x, places(encoding))) ** 3).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)["entries"]
    for item in range(3):
        one = torch.func.grad(loss)(values, x[item])["entries"]
        torch.testing.assert_close(each[item], one, atol=1e-11, rtol=0)


def test_planes_of_width_2_are_a_rotary_of_each_head():
    lie, rotary = LieRotary(D, H, block=2).double(), RotaryEncoding(D, layout="interleaved")
    theta = 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    torch.testing.assert_close(
        lie.entries.detach().abs().flatten(1), theta.expand(H, 1, -1).flatten(1), atol=1e-6, rtol=0
    )
    with torch.no_grad():
        lie.entries.copy_(theta.view(1, 1, -1, 1))
        lie.entries[1] *= 3
    x = vectors(4, H, N, D)
    torch.testing.assert_close(lie(x)[:, 0], rotary(x[:, 0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(lie(x)[:, 1], rotary(x[:, 1], 3 * torch.arange(N)), atol=1e-12, rtol=0)


def test_zero_skew_is_rope():
    string, rotary = CayleyString(D, H).double(), RotaryEncoding(D, layout="half_split")
    x = vectors(4, H, N, D)
    torch.testing.assert_close(string(x), rotary(x), atol=1e-5, rtol=0)  # frequencies of float32
    with torch.no_grad():
        string.frequencies.copy_((10_000.0 ** (-torch.arange(0, D, 2).double() / D)).unsqueeze(-1).expand(H, -1, -1))
    torch.testing.assert_close(string(x), rotary(x), atol=1e-13, rtol=0)


def test_all_planes_of_the_standard_frame_are_rope():
    planes, rotary = PlaneRotary(D, H, num_planes=D // 2).double(), RotaryEncoding(D, layout="half_split")
    with torch.no_grad():
        planes.frame.copy_(torch.eye(D).expand(H, -1, -1))
        planes.frequencies.copy_((10_000.0 ** (-torch.arange(0, D, 2).double() / D)).unsqueeze(-1).expand(H, -1, -1))
    x = vectors(4, H, N, D)
    torch.testing.assert_close(planes(x), rotary(x), atol=1e-13, rtol=0)


def test_what_is_not_in_a_plane_stays():
    planes = learned(BUILD["planes"])
    out = (
        torch.linalg.qr(planes.frame.detach().as_subclass(torch.Tensor), mode="complete").Q[..., 2:].mT
    )  # (H, D − 2, D)
    turned = planes(out, torch.full((D - 2,), 9))
    torch.testing.assert_close(turned, out, atol=1e-13, rtol=0)


def test_cayley_is_a_rotation_without_an_eigenvalue_of_minus_1():
    basis = learned(BUILD["cayley"]).basis(torch.float64)
    assert off_manifold(basis.detach(), SpecialOrthogonal(D)) <= 1e-12
    assert (torch.linalg.eigvals(basis) + 1).abs().min() > 1e-3


def test_one_learned_circulant_is_many_frequencies():
    string = learned(BUILD["circulant"])
    golden = np.linalg.eigvals(generators(string)[0, 0].numpy())
    spectrum = string.spectrum(torch.float64).detach()[0, 0].numpy()
    np.testing.assert_allclose(
        np.sort(np.abs(golden.imag)), np.sort(np.abs(np.r_[spectrum, spectrum[1:-1]])), atol=1e-12
    )
    np.testing.assert_allclose(golden.real, 0, atol=1e-12)


@every
def test_float32_rotations_far_away_are_rotations(build):
    encoding = build()
    far = torch.full((1,) if encoding.axes == 1 else (1, encoding.axes), 100_000)
    columns = torch.eye(D).view(D, 1, 1, D).expand(D, H, 1, D)
    turned = encoding(columns, far).detach().squeeze(-2).transpose(0, 1)  # (H, D, D)
    assert (turned @ turned.mT - torch.eye(D)).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_frame_is_orthonormal_in_half_precision_too(dtype):
    half = learned(BUILD["planes, full"]).to(dtype)
    off = half.frame.detach().double().mT @ half.frame.detach().double() - torch.eye(D)
    assert off.abs().max() > 1e-4  # rounding took the parameter off the manifold
    matrix = half.matrix(places(half))
    assert (matrix @ matrix.mT - torch.eye(D)).abs().max() <= 1e-12
    assert type(half.frame).__name__ == "ManifoldParameter"
    again = BUILD["planes, full"]()
    again.load_state_dict(half.state_dict())
    assert off_manifold(again.frame.detach(), again.frame.manifold) <= 1e-6


@commuting
def test_the_fold_has_the_same_scores(build):
    encoding = learned(build)
    basis, cheap = encoding.fold()
    assert isinstance(cheap, FoldedRotary)
    assert basis.shape == (H, D, D)
    assert (basis.mT @ basis - torch.eye(D)).abs().max() <= 1e-12
    query, key, at = vectors(3, 2 * H, N, D), vectors(3, H, N, D, seed=1), places(encoding)
    golden = [x.repeat_interleave(2 * H // x.size(1), 1) for x in encoding.rotate(query, key, at)]
    got = cheap.rotate(query @ basis.repeat_interleave(2, 0), key @ basis, at)
    got = [x.repeat_interleave(2 * H // x.size(1), 1) for x in got]
    torch.testing.assert_close(got[0] @ got[1].mT, golden[0] @ golden[1].mT, atol=1e-10, rtol=0)
    turned = cheap(query @ basis.repeat_interleave(2, 0), at) @ basis.mT.repeat_interleave(2, 0)
    torch.testing.assert_close(turned, encoding(query, at), atol=1e-10, rtol=0)


def test_the_fold_finds_planes_that_nearly_stand_still_or_turn_alike():
    """Frequencies over nine decades, some equal, some 0: where eigenvectors alone would be mixed."""
    for frequencies in (
        [1.0, 1e-3, 1e-6, 1e-9],
        [1.0, 1.0, 1e-7, 1e-7],
        [1.0, 0.0, 0.0, 1e-8],
        [0.0] * 4,
        [2.0, 2.0, 2.0, 2.0],
    ):
        torch.manual_seed(3)
        lie = LieRotary(8, 1, block=8).double()
        frame = torch.linalg.qr(vectors(8, 8)).Q
        A = frame[:, :4] @ torch.diag(torch.tensor(frequencies).double()) @ frame[:, 4:].T
        row, column = torch.tril_indices(8, 8, -1)
        with torch.no_grad():
            lie.entries.copy_((A - A.T)[row, column].view_as(lie.entries))
        basis, cheap = lie.fold()
        assert (basis.mT @ basis - torch.eye(8)).abs().max() <= 1e-12
        found = cheap.frequencies.detach().flatten().abs().sort().values
        torch.testing.assert_close(found, torch.tensor(sorted(frequencies)).double(), atol=1e-14, rtol=0)
        x, at = vectors(1, 20, 8), torch.arange(20) * 50
        torch.testing.assert_close(cheap(x @ basis, at) @ basis.mT, lie(x, at), atol=1e-10, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", [SoftmaxAttention, LieAttention])
@commuting
def test_a_layer_folds_in_place(build, kind, kv_heads, bias):
    encoding = learned(build, kv_heads)
    layer = kind(4 * D, 4, num_kv_heads=kv_heads, bias=bias, encoding=encoding).double()
    x, at = vectors(2, N, 4 * D), places(encoding)
    before = layer.mixing_matrix(x, positions=at), layer(x, positions=at)
    weight = layer.q_proj.weight
    fold_encoding(layer)
    assert isinstance(layer.encoding, FoldedRotary)
    assert layer.q_proj.weight is weight  # an optimizer that holds it holds the layer's
    after = layer.mixing_matrix(x, positions=at), layer(x, positions=at)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(two, one, atol=1e-10, rtol=0)


def test_what_is_no_encoding_by_itself_cannot_be_built():
    for base in (HeadRotation, BlockExponential):
        with pytest.raises(TypeError, match="abstract"):
            base(8, 2, 1, 4)


def test_what_cannot_be_folded():
    with pytest.raises(
        ValueError, match=r"fold: expected generators that commute, got LieRotary\(.*\); positions share"
    ):
        BUILD["lie, 2 axes"]().fold()
    with pytest.raises(TypeError, match=r"attention: expected a SelfAttention layer, got Linear; give"):
        fold_encoding(torch.nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match=r"attention: expected an encoding with a learned rotation .*, got ALiBi; there"
    ):
        fold_encoding(SoftmaxAttention(8, 2, encoding=ALiBi(2)))
    layer = SoftmaxAttention(16, 2, encoding=CayleyString(8, 2), scores=SpectralScores(16, 2))
    with pytest.raises(ValueError, match=r"attention: expected q_proj and k_proj, got scores=SpectralScores; its"):
        fold_encoding(layer)
    with pytest.raises(ShapeError, match=r"frequencies: expected \(heads, D/2, axes\), got shape \(2, 3\); take"):
        FoldedRotary(torch.ones(2, 3))


def expected(x, a, b, position):
    L = position[..., None, None] * (a.unsqueeze(-1) * b.unsqueeze(-2) - b.unsqueeze(-1) * a.unsqueeze(-2))
    return np.stack([scipy.linalg.expm(m.numpy()) @ v.numpy() for m, v in zip(L, x, strict=True)])


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-9, 1e-4, 0.3, 1.0, 5.0, 300.0])
@pytest.mark.parametrize("angle", ["free", "nearly parallel", "parallel", "orthogonal"])
def test_rodrigues_is_the_exponential(angle, scale):
    x, a, b = (vectors(6, D, seed=s) for s in range(3))
    a = a / a.norm(dim=-1, keepdim=True)
    if angle == "orthogonal":
        b = b - (a * b).sum(-1, keepdim=True) * a
    elif angle != "free":
        b = 2 * a + (1e-7 * b if angle == "nearly parallel" else 0)
    position = scale * torch.tensor([1.0, -1.0, 0.5, 2.0, 0.1, 0.0]).double()
    got = rodrigues(x, a, b, position)
    np.testing.assert_allclose(got.numpy(), expected(x, a, b, position), atol=1e-11)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", ["free", "parallel", "one is 0", "both are 0", "position 0", "tiny"])
def test_derivatives_of_rodrigues_are_those_of_the_exponential(kind):
    x, a, b = vectors(D), vectors(D, seed=1), vectors(D, seed=2)
    time = torch.tensor(0.0 if kind == "position 0" else 0.7).double()
    a, b = {
        "free": (a, b),
        "position 0": (a, b),
        "parallel": (a, -0.5 * a),
        "one is 0": (a, 0 * b),
        "both are 0": (0 * a, 0 * b),
        "tiny": (1e-160 * a, 1e-160 * b),
    }[kind]
    inputs = [v.clone().requires_grad_() for v in (x, a, b, time)]
    weight = vectors(D, seed=3)
    got = torch.autograd.grad((rodrigues(*inputs) * weight).sum(), inputs, create_graph=True)
    L = inputs[3] * (torch.outer(inputs[1], inputs[2]) - torch.outer(inputs[2], inputs[1]))
    golden = torch.autograd.grad((torch.matrix_exp(torch.stack([L, L]))[0] @ inputs[0] * weight).sum(), inputs)
    for one, two in zip(got, golden, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)
    second = torch.autograd.grad(sum(g.square().sum() for g in got), inputs)
    assert all(g.isfinite().all() for g in second)
    assert torch.autograd.gradcheck(rodrigues, inputs)


def test_rodrigues_is_a_plane_of_plane_rotary():
    planes = learned(BUILD["planes"])
    first, second = planes.frame.detach().as_subclass(torch.Tensor).chunk(2, -1)  # (H, D, 1)
    at, x = places(planes), vectors(H, N, D)
    angle = at * planes.frequencies.detach()[:, 0]  # (H, N)
    golden = rodrigues(x, second.mT, first.mT, angle)
    torch.testing.assert_close(planes(x, at).detach(), golden, atol=1e-12, rtol=0)


def test_rodrigues_in_half_precision_is_float32():
    x, a, b = (vectors(D, seed=s).to(torch.bfloat16) for s in range(3))
    got = rodrigues(x, a, b, 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), rodrigues(x.double(), a.double(), b.double(), 2.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LieRotary(7, 2), ShapeError, r"head_width: expected an even number, got 7; .*choose"),
        (lambda: LieRotary(8, 0), ShapeError, r"num_heads: expected an integer from 1, got 0; change"),
        (lambda: LieRotary(8, 2, axes=0), ShapeError, r"axes: expected an integer from 1, got 0; change"),
        (
            lambda: LieRotary(8, 2, block=3),
            ShapeError,
            r"block: expected a divisor of head_width=8 from 2, got 3; head",
        ),
        (
            lambda: LieRotary(8, 2, block=1),
            ShapeError,
            r"block: expected a divisor of head_width=8 from 2, got 1; head",
        ),
        (lambda: LieRotary(8, 2, base=0), ValueError, r"base: expected a number > 0, got 0; RoPE's"),
        (lambda: AxialBlocks(8, 2, axes=3, block=4), ShapeError, r"block: expected at most .* = 2, got 4; every axis"),
        (lambda: DependentBlocks(8, 2, block=16), ShapeError, r"block: expected a divisor of .*, got 16; head_width"),
        (lambda: CayleyString(0, 2), ShapeError, r"head_width: expected an integer from 1, got 0; change"),
        (lambda: CirculantString(2, 2), ShapeError, r"head_width: expected at least 4, got 2; a circulant"),
        (
            lambda: PlaneRotary(8, 2, num_planes=5),
            ShapeError,
            r"num_planes: expected at most .* = 4, got 5; planes are",
        ),
        (lambda: PlaneRotary(8, 2, num_planes=0), ShapeError, r"num_planes: expected an integer from 1, got 0; change"),
        (
            lambda: rodrigues(torch.zeros(3), torch.zeros(2), torch.zeros(3)),
            ShapeError,
            r"a: expected width 3, got shape \(2,\); match that of x",
        ),
        (
            lambda: rodrigues(torch.zeros(3).long(), torch.zeros(3), torch.zeros(3)),
            DtypeError,
            r"x: expected a floating-point tensor, got torch.int64; convert",
        ),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


@every
def test_bad_heads(build):
    encoding = build()
    with pytest.raises(ShapeError, match=r"x: expected a multiple of 2 heads, got shape \(3, 7, 12\); match num_heads"):
        encoding(torch.zeros(3, N, D), places(encoding))
    with pytest.raises(ShapeError, match=r"key: expected width 12, got shape \(2, 7, 6\); match head_width"):
        encoding.rotate(torch.zeros(2, N, D), torch.zeros(2, N, 6), places(encoding))
