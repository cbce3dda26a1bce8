"""The operations that torch's counter does not see, counted by hand."""

import pytest
import torch

from experiments.flops import count_flops

B, N, R = 3, 6, 2
SOLVE = B * (2 * N**3 // 3 + 2 * N * N * R)  # LU, two triangular solves


def _lower():
    return torch.eye(N).expand(B, N, N) + torch.ones(B, N, N).tril(-1)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        # 1-norm 10 in float32: two squarings bring it under 3.01; five products of the Taylor scheme
        (lambda: torch.matrix_exp(torch.full((B, N, N), 10 / N)), B * (5 + 2) * 2 * N**3),
        (lambda: torch.matrix_exp(torch.zeros(B, N, N)), B * 5 * 2 * N**3),
        # float64 reaches 1.09 only: four squarings
        (lambda: torch.matrix_exp(torch.full((B, N, N), 10 / N, dtype=torch.float64)), B * (5 + 4) * 2 * N**3),
        (lambda: torch.linalg.solve_triangular(_lower(), torch.ones(B, N, R), upper=False), B * N * N * R),
        (lambda: torch.linalg.solve(_lower(), torch.ones(B, N, R)), SOLVE),
        (lambda: torch.linalg.inv(_lower()), B * 2 * N**3),
        (lambda: torch.ones(B, N, N) @ torch.ones(B, N, R), B * 2 * N * N * R),
    ],
    ids=["matrix_exp", "matrix_exp of 0", "matrix_exp float64", "solve_triangular", "solve", "inv", "matmul"],
)
def test_forward(call, expected):
    assert count_flops(call) == expected


def test_backward_of_matrix_exp_is_that_of_a_block_twice_as_large():
    matrix = torch.zeros(B, N, N, requires_grad=True)
    assert count_flops(lambda: torch.matrix_exp(matrix).diagonal(dim1=-2, dim2=-1).sum().backward()) >= (
        B * 5 * 2 * (N**3 + (2 * N) ** 3)
    )


def test_backward_of_solves():
    """One more solve with the same factors, and one outer product for the matrix."""
    matrix, right = _lower().requires_grad_(), torch.ones(B, N, R, requires_grad=True)
    outer = B * 2 * N * R * N
    whole = count_flops(lambda: torch.linalg.solve(matrix, right).sum().backward())
    assert whole == SOLVE + B * 2 * N * N * R + outer
    whole = count_flops(lambda: torch.linalg.solve_triangular(matrix, right, upper=False).sum().backward())
    assert whole == 2 * B * N * N * R + outer
