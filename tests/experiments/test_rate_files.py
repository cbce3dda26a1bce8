"""Generators and counts from files, and simulated counts: every good file, every malformed one, and the law."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from experiments.rate_recovery import published
from experiments.rate_recovery.counts import TransitionCounts, read_counts, simulate_counts
from experiments.rate_recovery.paml import generator_from, read_generator, read_paml
from liegroup_attn.algebra import is_rate_matrix
from liegroup_attn.errors import GeneratorError, ShapeError

S3 = torch.tensor([[0.0, 1, 2], [1, 0, 4], [2, 4, 0]], dtype=torch.float64)
PI3 = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
S4 = torch.tensor([[0.0, 1, 2, 4], [1, 0, 3, 5], [2, 3, 0, 6], [4, 5, 6, 0]], dtype=torch.float64)
PI4 = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


class Good(NamedTuple):
    text: str
    s: torch.Tensor = S3
    pi: torch.Tensor = PI3


GOOD = {
    "n = 3": Good("1\n2 4\n\n0.5 0.25 0.25\n"),
    "in one line": Good("1 2 4 0.5 0.25 0.25"),
    "any white space": Good("\n\n 1\t2\n4 .5\n\n   2.5e-1\n0.25  \n\n"),
    "text behind": Good("1\n2 4\n.5 .25 .25\n\nA R N\n3905 sequences, 182 families"),
    "text behind in the same line": Good("1\n2 4\n.5 .25 .25 // 3 states\n 7 8"),
    "line ends of Windows": Good("1\r\n2 4\r\n\r\n.5 .25 .25\r\nAla"),
    "comments": Good("# Nobody 1900, 12 numbers\n1\n2 4\n  # frequencies\n.5 .25 .25\n"),
    "rounded frequencies": Good(
        "1\n2 4\n.50003 .25 .25\n", pi=torch.tensor([0.50003, 0.25, 0.25], dtype=torch.float64) / 1.00003
    ),
    "n = 4": Good("1\n2 3\n4 5 6\n.1 .2 .3 .4", S4, PI4),
    "n = 2": Good("3\n.5 .5", torch.tensor([[0.0, 3], [3, 0]]).double(), torch.tensor([0.5, 0.5]).double()),
    "a rate of 0": Good("0\n2 4\n.5 .25 .25", torch.tensor([[0.0, 0, 2], [0, 0, 4], [2, 4, 0]]).double()),
}
BAD = {
    "empty": ("", ShapeError, r"got 0 numbers before the end"),
    "words": ("rates\n1\n2 4\n.5 .25 .25", ShapeError, r"got 0 numbers before 'rates' in line 1"),
    "a number too few": ("1\n2 4\n.5 .25", ShapeError, r"n\(n − 1\)/2 exchangeabilities and n freq.*got 5 numbers"),
    "a number too many": ("1\n2 4\n.5 .25 .25 .25", ShapeError, "got 7 numbers before the end"),
    "one number": ("1", ShapeError, "got 1 numbers"),
    "a word in the middle": ("1\n2 x4\n.5 .25 .25", ShapeError, "got 2 numbers before 'x4' in line 2"),
    "a negative rate": ("-1\n2 4\n.5 .25 .25", GeneratorError, "expected finite numbers ≥ 0, got -1"),
    "a negative frequency": ("1\n2 4\n.75 .5 -.25", GeneratorError, "expected finite numbers ≥ 0, got -0.25"),
    "NaN": ("1\n2 nan\n.5 .25 .25", GeneratorError, "expected finite numbers"),
    "infinite": ("1\n2 inf\n.5 .25 .25", GeneratorError, "expected finite numbers"),
    "a frequency of 0": ("1\n2 4\n.5 .5 0", GeneratorError, "3 positive frequencies .* the least 0;"),
    "no frequencies": ("1\n2 4\n1 2 3", GeneratorError, "that sum to 1 within 0.01, got the sum 6 "),
    "off by 0.02": ("1\n2 4\n.52 .25 .25", GeneratorError, "that sum to 1 within 0.01, got the sum 1.02 "),
}


@pytest.fixture
def write(tmp_path):
    def write(text, name="rates.dat"):
        (tmp_path / name).write_bytes(text.encode())
        return tmp_path / name

    return write


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD)
def test_rate_files_are_read(good, write):
    s, pi = read_paml(write(good.text))
    torch.testing.assert_close(s, good.s, atol=0, rtol=0)
    torch.testing.assert_close(pi, good.pi, atol=1e-9, rtol=0)
    assert float(pi.sum()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("text", "error", "message"), BAD.values(), ids=BAD)
def test_malformed_rate_files_are_named(text, error, message, write):
    for read in (read_paml, read_generator):
        with pytest.raises(error, match=message):
            read(write(text))


def test_frequencies_that_are_a_little_off_are_divided_with_a_warning(write):
    with pytest.warns(UserWarning, match=r"frequencies sum to 1.005; they are divided"):
        _, pi = read_paml(write("1\n2 4\n.505 .25 .25"))
    torch.testing.assert_close(pi, torch.tensor([0.505, 0.25, 0.25]).double() / 1.005)


@pytest.mark.parametrize(("s", "pi"), [(S3, PI3), (S4, PI4)], ids=["n = 3", "n = 4"])
def test_the_generator_of_a_rate_file(s, pi):
    Q = generator_from(s, pi)
    assert is_rate_matrix(Q) == (True, None)
    flow = pi[:, None] * Q
    torch.testing.assert_close(flow, flow.mT, atol=1e-15, rtol=0)  # detailed balance
    assert float(-(pi * Q.diagonal()).sum()) == pytest.approx(1, abs=1e-15)
    free = generator_from(s, pi, normalize=False)
    off = ~torch.eye(len(pi), dtype=torch.bool)
    torch.testing.assert_close(free[off], (s * pi)[off])
    torch.testing.assert_close(Q * (free[0, 0] / Q[0, 0]), free)


@pytest.mark.parametrize(
    ("s", "pi", "error", "message"),
    [
        (S3, PI4, ShapeError, r"expected \(n, n\) and \(n,\), got \(3, 3\) and \(4,\)"),
        (S3, PI3[None], ShapeError, "got"),
        (S3.triu(), PI3, GeneratorError, "expected a symmetric matrix"),
        (-S3, PI3, GeneratorError, "numbers ≥ 0"),
        (S3 * torch.nan, PI3, GeneratorError, "numbers ≥ 0"),
        (S3, 2 * PI3, GeneratorError, "that sum to 1, got the least 0.5 and the sum 2"),
        (S3, torch.tensor([1.0, 0.0, 0.0]), GeneratorError, "expected positive numbers"),
        (0 * S3, PI3, GeneratorError, "expected some transition"),
    ],
)
def test_bad_exchangeabilities(s, pi, error, message):
    with pytest.raises(error, match=message):
        generator_from(s, pi)


def test_a_matrix_is_read_as_it_is_and_its_diagonal_made_exact(write):
    Q = read_generator(write("# mine\n-3 1 2\n0 0 0\n0.3333 0.3333 -0.6667\n"))
    assert torch.equal(Q[0], torch.tensor([-3.0, 1, 2], dtype=torch.float64))
    assert is_rate_matrix(Q) == (True, None)
    torch.testing.assert_close(read_generator(write(GOOD["n = 4"].text)), generator_from(S4, PI4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1 1\n1 -2\n", "rows must sum to 0"),
        ("1 -1\n-1 1\n", "off-diagonal"),
        ("-1 1\ninf -inf\n", "finite"),
        ("0.5 0.5\n0.5 0.5\n", "rows must sum to 0"),
    ],
)
def test_matrices_that_are_no_generators(text, message, write):
    with pytest.raises(GeneratorError, match=message):
        read_generator(write(text))


def test_no_such_file(tmp_path):
    for read in (read_paml, read_generator, lambda path: read_counts(path, [1.0])):
        with pytest.raises(FileNotFoundError, match=r"expected a file .*nowhere.*; correct the path"):
            read(tmp_path / "nowhere")


def test_download(tmp_path, write, monkeypatch):
    text = GOOD["n = 3"].text
    right = hashlib.sha256(text.encode()).hexdigest()
    for ends, name in (("\n", "unix.dat"), ("\r\n", "windows.dat")):  # distributions differ in the ends of lines
        file = write(text.replace("\n", ends), name)
        monkeypatch.setitem(published.PUBLISHED, "lg", (file.as_uri(), right))
        data = TransitionCounts(cache_dir=str(tmp_path / "cache"), transitions=10)
        data.prepare_data()
        assert [path.name for path in data.folder.glob("*")] == [name]
        data.setup()
        torch.testing.assert_close(data.generator, generator_from(S3, PI3))
        (data.folder / name).unlink()
    monkeypatch.setitem(published.PUBLISHED, "lg", (file.as_uri(), "0" * 64))
    with pytest.raises(ValueError, match=r"expected sha256 0000.*, got .*; it was deleted"):
        data.prepare_data()
    assert list(data.folder.glob("*")) == []
    monkeypatch.setitem(published.PUBLISHED, "lg", ((tmp_path / "nowhere.dat").as_uri(), right))
    with pytest.raises(ConnectionError, match="pass path="):
        data.prepare_data()
    with pytest.raises(ValueError, match="expected one of"):
        published.download_generator("lgg", tmp_path)


def test_public_generators_are_pinned():
    for url, sha256 in published.PUBLISHED.values():
        assert url.startswith("https://")
        assert len(url.split("/")[5]) == 40  # a commit
        assert len(sha256) == 64


# counts


@pytest.mark.parametrize("n", [3, 4])
def test_simulated_counts_have_the_law_of_the_chain(n):
    """Chi-square of n_ij(t) against n π_i P_ij(t), P by SciPy."""
    Q, pi = (generator_from(S3, PI3), PI3) if n == 3 else (generator_from(S4, PI4), PI4)
    times, size = [0.2, 1.5], 30_001
    counts = simulate_counts(Q, times, size, seed=4)
    assert counts.shape == (2, n, n)
    assert counts.sum((1, 2)).tolist() == [15_001, 15_000]
    assert torch.equal(counts, counts.round())
    for table, time in zip(counts.numpy(), times, strict=True):
        expected = table.sum() * pi.numpy()[:, None] * scipy.linalg.expm(time * Q.numpy())
        assert scipy.stats.chisquare(table.ravel(), expected.ravel()).pvalue > 0.01
        wrong = table.sum() * pi.numpy()[:, None] * scipy.linalg.expm(1.5 * time * Q.numpy())
        assert scipy.stats.chisquare(table.ravel(), wrong.ravel()).pvalue < 1e-3  # the test can fail


def test_the_mean_of_simulated_counts():
    Q, size, seeds = generator_from(S3, PI3), 50, 400
    mean = torch.stack([simulate_counts(Q, [0.7], size, seed) for seed in range(seeds)]).mean(0)[0] / size
    p = PI3.numpy()[:, None] * scipy.linalg.expm(0.7 * Q.numpy())
    assert (np.abs(mean.numpy() - p) < 4.5 * np.sqrt(p * (1 - p) / size / seeds)).all()


def test_simulated_counts_are_a_function_of_the_seed():
    Q = generator_from(S3, PI3)
    assert torch.equal(simulate_counts(Q, [1.0], 100, 1), simulate_counts(Q, (1.0,), 100, 1))
    assert not torch.equal(simulate_counts(Q, [1.0], 100, 1), simulate_counts(Q, [1.0], 100, 2))


@pytest.mark.parametrize("suffix", [".npz", ".txt"])
def test_counts_come_from_a_file(suffix, tmp_path):
    counts, file = simulate_counts(generator_from(S3, PI3), [0.5, 1.0], 100, 0), tmp_path / f"counts{suffix}"
    if suffix == ".npz":
        np.savez(file, counts=counts.numpy().astype(np.int32), times=np.array([0.5, 1.0]))
    else:
        file.write_text("\n\n".join("\n".join(" ".join(f"{x:g}" for x in row) for row in t) for t in counts.tolist()))
    data = TransitionCounts(counts=str(file), times=[0.25] if suffix == ".npz" else [0.5, 1.0], steps=3)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert torch.equal(batches[2]["counts"], counts)
    assert batches[0]["times"].tolist() == [0.5, 1.0]
    assert data.generator is None
    assert "generator" not in next(iter(data.test_dataloader()))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("1 2 3\n4 5 6\n", ShapeError, r"expected counts \(T, n, n\)"),
        ("1 2\n3\n", ShapeError, "expected counts"),
        ("1 2\n3 four\n", ShapeError, "expected counts"),
        ("1 2\n3 4\n5 6\n7 8\n", ShapeError, r"for T = 1 times, got \(2, 2, 2\)"),
        ("1 -2\n3 4\n", GeneratorError, "counts ≥ 0"),
        ("1 nan\n3 4\n", GeneratorError, "counts ≥ 0"),
        ("0 0\n0 0\n", GeneratorError, "not all 0"),
    ],
)
def test_malformed_counts(text, error, message, write):
    with pytest.raises(error, match=message):
        read_counts(write(text, "counts.txt"), [1.0])


def test_malformed_archives(tmp_path):
    np.savez(tmp_path / "other.npz", numbers=np.ones((1, 2, 2)))
    with pytest.raises(ShapeError, match="array counts"):
        read_counts(tmp_path / "other.npz", [1.0])
    np.savez(tmp_path / "flat.npz", counts=np.ones(4))
    with pytest.raises(ShapeError, match=r"got \(4,\)"):
        read_counts(tmp_path / "flat.npz", [1.0])
    np.savez(tmp_path / "negative.npz", counts=np.ones((1, 2, 2)), times=[-1.0])
    with pytest.raises(GeneratorError, match="positive numbers"):
        read_counts(tmp_path / "negative.npz", [1.0])


@pytest.mark.parametrize(
    "wrong",
    [{"transitions": 0}, {"seed": -1}, {"steps": 0}, {"times": []}, {"times": [0.0]}, {"times": [float("inf")]}],
)
def test_bad_settings_of_the_data(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        TransitionCounts(**wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [("-1 1 0 0\n1 -1 0 0\n0 0 -1 1\n0 0 1 -1\n", "class"), ("-1 1 0\n0 -1 1\n0 0 0\n", "leaves state 0 for good")],
    ids=["two classes", "absorbing"],
)
def test_a_chain_that_does_not_come_back_is_refused(text, message, write):
    data = TransitionCounts(str(write(text)), transitions=10)
    with pytest.raises(GeneratorError, match=message):
        data.setup()
