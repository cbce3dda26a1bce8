"""Scaled frequencies: against the papers' formulas in plain floats, constants made by hand, transformers' tables, and scores."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch

from liegroup_attn.errors import ShapeError
from liegroup_attn.positional import (
    DynamicNTK,
    FrequencyScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    RotaryEncoding,
    YaRN,
)

SHORT, LONG = [1.0 + i / 64 for i in range(64)], [2.0 + i for i in range(64)]
L0 = 4096
SCALINGS: dict[str, FrequencyScaling] = {
    "linear": LinearScaling(4.0),
    "dynamic": DynamicNTK(4.0, L0),
    "yarn": YaRN(4.0, L0),
    "longrope": LongRoPE(SHORT, LONG, L0, 4.0),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, L0),
}
bases = pytest.mark.parametrize("base", [10_000.0, 500_000.0])
lengths = pytest.mark.parametrize("length", [1, 100, L0, L0 + 1, 9000, 65_536])


def plain(base: float, width: int) -> list[float]:
    return [base ** (-2 * i / width) for i in range(width // 2)]


def scaled(scaling: FrequencyScaling, base: float, width: int, length: int = 1) -> tuple[list[float], float]:
    theta = torch.tensor(plain(base, width), dtype=torch.float64)
    got, factor = scaling.frequencies(theta, base, torch.full((1, 1), length - 1.0, dtype=torch.float64))
    return got.flatten().tolist(), factor


def of_linear(base: float, width: int, length: int) -> tuple[list[float], float]:
    """Chen et al. 2023, equation 3: position m becomes m·L/L′, s = L′/L."""
    return [theta * L0 / (4 * L0) for theta in plain(base, width)], 1.0


def of_dynamic(base: float, width: int, length: int) -> tuple[list[float], float]:
    """bloc97's: base·(s·n/L − (s − 1))^(d/(d − 2)), n the current length once it exceeds L."""
    n = max(length, L0)
    return plain(base * (4 * n / L0 - 3) ** (width / (width - 2)), width), 1.0


def of_yarn(base: float, width: int, length: int) -> tuple[list[float], float]:
    """Published code: the ramp runs over pairs, between where they turn 32 times and once within L; §3.4: √(1/t)."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(L0 / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(pair_that_turns(32)), math.ceil(pair_that_turns(1))
    out = []
    for i, theta in enumerate(plain(base, width)):
        gamma = 1 - min(max((i - low) / (high - low), 0), 1)  # 1 leaves, 0 interpolates
        out.append((1 - gamma) * theta / 4 + gamma * theta)
    return out, 0.1 * math.log(4) + 1


def of_longrope(base: float, width: int, length: int) -> tuple[list[float], float]:
    """Each frequency by its own divisor λ_i; √(1 + ln s/ln L)."""
    factors = LONG if length > L0 else SHORT
    return [theta / f for theta, f in zip(plain(base, width), factors, strict=True)], math.sqrt(
        1 + math.log(4) / math.log(L0)
    )


def of_llama3(base: float, width: int, length: int) -> tuple[list[float], float]:
    """By wavelength: short ones are left, long ones interpolated, between them smoothly."""
    out = []
    for theta in plain(base, width):
        wave = 2 * math.pi / theta
        smooth = (L0 / wave - 1) / (4 - 1)
        between = (1 - smooth) * theta / 8 + smooth * theta
        out.append(theta if wave < L0 / 4 else theta / 8 if wave > L0 / 1 else between)
    return out, 1.0


FORMULAS: dict[str, Callable[[float, int, int], tuple[list[float], float]]] = {
    "linear": of_linear,
    "dynamic": of_dynamic,
    "yarn": of_yarn,
    "longrope": of_longrope,
    "llama3": of_llama3,
}
kinds = pytest.mark.parametrize("kind", SCALINGS)


@lengths
@bases
@kinds
def test_the_published_formula(kind, base, length):
    got, factor = scaled(SCALINGS[kind], base, 128, length)
    golden, golden_factor = FORMULAS[kind](base, 128, length)
    assert got == pytest.approx(golden, rel=1e-12)
    assert factor == pytest.approx(golden_factor, rel=1e-15)


BY_HAND = [
    # θ = 1, 1/10, 1/100, 1/1000 of base 10⁴ and width 8.
    (LinearScaling(4.0), 1, [0.25, 0.025, 0.0025, 0.00025], 1.0),
    # n = 2L: growth 4·2 − 3 = 5, base 10⁴·5^(8/6), so θ_i·5^(−i/3): the last pair by s′ = 5 exactly.
    (DynamicNTK(4.0, 8), 16, [1, 0.1 / 5 ** (1 / 3), 0.01 / 5 ** (2 / 3), 0.001 / 5], 1.0),
    (DynamicNTK(4.0, 8), 8, [1, 0.1, 0.01, 0.001], 1.0),
    # L = 200·2π: turns 200, 20, 2, 0.2. i(32) = 0.7959, i(1) = 2.3010; rounded outwards 0 and 3: ramp 0, 1/3, 2/3, 1.
    (
        YaRN(math.e, 400 * math.pi),
        1,
        [1, 0.1 * (2 / 3 + 1 / (3 * math.e)), 0.01 * (1 / 3 + 2 / (3 * math.e)), 0.001 / math.e],
        1.1,
    ),
    # √(1 + ln 16/ln 16) = √2.
    (LongRoPE([1, 1, 1, 1], [1, 2, 4, 5], 16, 16.0), 17, [1, 0.05, 0.0025, 0.0002], 2**0.5),
    (LongRoPE([1, 1, 1, 1], [1, 2, 4, 5], 16, 16.0), 16, [1, 0.1, 0.01, 0.001], 2**0.5),
    # Turns 200, 20, 2, 0.2 between 1 and 4: kept 1, 1, 1/3, 0.
    (Llama3Scaling(8.0, 1.0, 4.0, 400 * math.pi), 1, [1, 0.1, 0.01 * (1 / 3 + 2 / 24), 0.001 / 8], 1.0),
]


@pytest.mark.parametrize(
    ("scaling", "length", "golden", "factor"), BY_HAND, ids=[f"{type(row[0]).__name__} {row[1]}" for row in BY_HAND]
)
def test_constants_made_by_hand(scaling, length, golden, factor):
    got, own = scaled(scaling, 10_000.0, 8, length)
    assert got == pytest.approx(golden, rel=1e-12)
    assert own == pytest.approx(factor, rel=1e-15)


def test_llama_3_1_has_these_numbers():
    """Wavelengths beyond 8192 are eight times as long, below 2048 as they were: base 500 000, width 128."""
    got, _ = scaled(Llama3Scaling(8.0, 1.0, 4.0, 8192), 500_000.0, 128)
    before = plain(500_000.0, 128)
    ratios = [b / g for b, g in zip(before, got, strict=True)]
    # 2π·500000^(i/64) = 2048 at i = 28.22 and 8192 at i = 34.98.
    assert ratios[:29] == pytest.approx([1.0] * 29, rel=1e-12)
    assert ratios[35:] == pytest.approx([8.0] * 29, rel=1e-12)
    assert all(1 < a < b < 8 for a, b in itertools.pairwise(ratios[29:35]))


@bases
def test_yarn_s_paper_ramps_over_turns_as_llama3_does(base):
    """§3.2: γ(r) = (r − α)/(β − α) of r = L/λ; the published code agrees with it outside of the ramp alone."""
    s, alpha, beta = 4.0, 1.0, 32.0
    paper = []
    for theta in plain(base, 128):
        gamma = min(max((L0 * theta / (2 * math.pi) - alpha) / (beta - alpha), 0), 1)
        paper.append((1 - gamma) * theta / s + gamma * theta)
    assert scaled(Llama3Scaling(s, alpha, beta, L0), base, 128)[0] == pytest.approx(paper, rel=1e-12)
    code = scaled(YaRN(s, L0), base, 128)[0]
    turns = [L0 * theta / (2 * math.pi) for theta in plain(base, 128)]
    sure = [i for i, r in enumerate(turns) if r < alpha / 2 or r > 2 * beta]
    assert [code[i] for i in sure] == pytest.approx([paper[i] for i in sure], rel=1e-12)
    assert max(c / p for c, p in zip(code, paper, strict=True)) > 1.5  # within it, by so much


def test_yarn_leaves_all_pairs_that_are_all_fast():
    """10 000 turns of the slowest pair: beyond the last pair, where the published code's clamps would interpolate all."""
    got, _ = scaled(YaRN(4.0, 10**6), 10.0, 8)
    assert got == pytest.approx(plain(10.0, 8), rel=1e-12)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": L0}
TRANSFORMERS: dict[str, tuple[FrequencyScaling, dict[str, object]]] = {
    "linear": (SCALINGS["linear"], {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (SCALINGS["dynamic"], {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": (SCALINGS["yarn"], YARN),
    "yarn, ends not rounded": (YaRN(4.0, L0, truncate=False), YARN | {"truncate": False}),
    "yarn, own factor": (YaRN(4.0, L0, attention_factor=1.5), YARN | {"attention_factor": 1.5}),
    "yarn, own ramp": (YaRN(4.0, L0, 16.0, 2.0), YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "longrope": (
        SCALINGS["longrope"],
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": L0,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    ),
    "llama3": (
        SCALINGS["llama3"],
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": L0,
        },
    ),
}


@pytest.mark.parametrize("length", [1, L0, L0 + 1, 9000])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@bases
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_as_transformers(kind, base, partial, length):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    ours, options = TRANSFORMERS[kind]
    given = {"rope_theta": base, "partial_rotary_factor": partial, **options}
    # A head twice as wide where half of it turns.
    config = LlamaConfig(head_dim=int(128 / partial), max_position_embeddings=L0, rope_parameters=given)
    golden, factor = rope.ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu", seq_len=length)
    got, own = scaled(ours, base, 128, length)
    torch.testing.assert_close(torch.tensor(got), golden.float(), rtol=2e-5, atol=0)
    assert own == pytest.approx(factor, rel=1e-12)


@bases
def test_plain_rope_as_transformers(base):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    given = {"rope_type": "default", "rope_theta": base}
    config = llama.LlamaConfig(head_dim=128, max_position_embeddings=L0, rope_parameters=given)
    theirs, at = llama.LlamaRotaryEmbedding(config), torch.tensor([[0, 1, 7, 100, 4095]])
    assert theirs.attention_scaling == 1
    query, key = torch.randn(2, 1, 2, 5, 128).unbind(0)
    golden = llama.apply_rotary_pos_emb(query, key, *theirs(query, at))
    got = RotaryEncoding(128, layout="half_split", base=base).rotate(query, key, at)
    for ours, expected in zip(got, golden, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)  # their angles, of 4095 radians in float32
    torch.testing.assert_close(torch.tensor(plain(base, 128)), theirs.inv_freq, rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_scores_have_the_square_of_the_factor(kind, width, layout):
    """Of the features that turn, and of these alone."""
    quarter = {
        "yarn": lambda a: YaRN(16.0, 64, attention_factor=a),
        "longrope": lambda a: LongRoPE([1.5] * (width // 2), [3.0] * (width // 2), 8, 4.0, attention_factor=a),
    }[kind]
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 12, 16, dtype=torch.float64).unbind(0)

    def scores(scaling: FrequencyScaling, keep: slice) -> torch.Tensor:
        q, k = RotaryEncoding(16, layout=layout, rotary_width=width, scaling=scaling).rotate(query, key)
        return q[..., keep] @ k[..., keep].mT

    bare, default = quarter(1.0), quarter(None)
    expected = (0.1 * math.log(16) + 1) ** 2 if kind == "yarn" else 1 + math.log(4) / math.log(8)
    assert expected > 1.5
    turning, passing = slice(None, width), slice(width, None)
    torch.testing.assert_close(scores(default, turning), expected * scores(bare, turning), atol=1e-12, rtol=1e-12)
    assert torch.equal(scores(default, passing), query[..., passing] @ key[..., passing].mT)


def test_each_sequence_has_its_own_length():
    """A short sequence beside a long one is turned as if alone."""
    rotary = RotaryEncoding(8, layout="half_split", scaling=DynamicNTK(4.0, 8))
    x = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    at = torch.stack([torch.arange(6), torch.arange(20, 26)]).unsqueeze(1)
    both = rotary(x, at)
    for item in range(2):
        torch.testing.assert_close(both[item], rotary(x[item], at[item]), atol=1e-14, rtol=0)
    plain_turn = RotaryEncoding(8, layout="half_split")(x, at)
    torch.testing.assert_close(both[0], plain_turn[0], atol=1e-14, rtol=0)
    assert (both[1] - plain_turn[1]).abs().max() > 0.1


REFUSED = {
    "linear factor": (lambda: LinearScaling(0.5), "factor: expected a number ≥ 1, got 0.5; "),
    "factor nan": (lambda: LinearScaling(math.nan), "factor: expected a number ≥ 1, got nan; "),
    "factor infinite": (lambda: LinearScaling(math.inf), "factor: expected a number ≥ 1, got inf; "),
    "dynamic factor": (lambda: DynamicNTK(0.0, 8), "factor: expected a number ≥ 1, got 0.0; "),
    "dynamic length": (lambda: DynamicNTK(2.0, 0), "original_length: expected a number ≥ 1, got 0; "),
    "yarn factor": (lambda: YaRN(-1.0, 64), "factor: expected a number ≥ 1, got -1.0; "),
    "yarn betas": (lambda: YaRN(2.0, 64, beta_slow=40.0), "beta_slow: expected 0 < beta_slow < 32.0, got 40.0; "),
    "yarn length": (lambda: YaRN(2.0, 6), "original_length: expected more than 2π·beta_slow = 6.28319, got 6; "),
    "yarn attention": (
        lambda: YaRN(2.0, 64, attention_factor=0.0),
        "attention_factor: expected a number > 0, got 0.0; ",
    ),
    "yarn base": (
        lambda: scaled(YaRN(2.0, 64), 1.0, 8),
        "base: expected a number > 1 for YaRN, got 1.0; ",
    ),
    "longrope length": (lambda: LongRoPE([1.0], [2.0], 1), "original_length: expected a number ≥ 2, got 1; "),
    "longrope factor": (lambda: LongRoPE([1.0], [2.0], 8, 0.9), "factor: expected a number ≥ 1, got 0.9; "),
    "longrope divisor": (
        lambda: LongRoPE([1.0, 0.0], [2.0, 2.0], 8),
        "short_factor[1]: expected a number > 0, got 0.0; ",
    ),
    "longrope short list": (
        lambda: scaled(LongRoPE([1.0] * 3, [2.0] * 4, 8), 100.0, 8),
        "short_factor: expected 4 numbers, got 3; ",
    ),
    "longrope long list": (
        lambda: scaled(LongRoPE([1.0] * 4, [2.0] * 5, 8), 100.0, 8),
        "long_factor: expected 4 numbers, got 5; ",
    ),
    "llama3 factor": (lambda: Llama3Scaling(0.1, 1.0, 4.0, 64), "factor: expected a number ≥ 1, got 0.1; "),
    "llama3 order": (
        lambda: Llama3Scaling(8.0, 4.0, 1.0, 64),
        "low_frequency_factor: expected 0 < low < high = 1.0, got 4.0; ",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_scaling_refuses(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + r"\w+"):
        make()


def test_lists_of_another_length_are_a_matter_of_shape():
    rotary = RotaryEncoding(8, layout="half_split", scaling=LongRoPE([1.0], [2.0], 8))
    with pytest.raises(ShapeError, match="short_factor"):
        rotary(torch.ones(2, 8))


def test_a_lone_pair_has_no_base_to_grow():
    assert scaled(DynamicNTK(4.0, 8), 100.0, 2, 64) == ([1.0], 1.0)
