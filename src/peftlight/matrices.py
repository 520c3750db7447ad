"""Matrices that are a product of low rank, or given whole: sums, norms, singular values, and angles between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peftlight.delta import Factors

_FLOAT32 = torch.finfo(torch.float32).eps
_FLOAT64 = torch.finfo(torch.float64).eps


class SVD(NamedTuple):
    """U (out, k) and V (in, k) with orthonormal columns and the singular values S (k,), largest first, M = U S Vᵀ."""

    U: Tensor
    S: Tensor
    V: Tensor


@dataclass(frozen=True)
class Matrix:
    """M (out, in) in float64: the product B A of `factors`, or what `whole` holds. A vector is a matrix (out, 1)."""

    factors: Factors | None = None
    whole: Tensor | None = None

    @classmethod
    def of_factors(cls, factors: Factors) -> "Matrix":
        """The product, whose norms and singular values cost as much as the rank, squared, asks for."""
        A, B = factors
        return cls(factors=(A.detach().double(), B.detach().double()))

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> "Matrix":
        """A tensor of any shape, with all its dimensions after the first as one."""
        return cls(whole=tensor.detach().double().reshape(len(tensor) if tensor.dim() else 1, -1))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.factors is not None:
            A, B = self.factors
            return len(B), A.shape[1]
        assert self.whole is not None
        return self.whole.shape[0], self.whole.shape[1]

    def dense(self) -> Tensor:
        """(out, in), multiplied out."""
        if self.factors is not None:
            A, B = self.factors
            return B @ A
        assert self.whole is not None
        return self.whole

    @cached_property
    def svd(self) -> SVD:
        """The singular value decomposition, without what rounding in float64 could have made up."""
        return _svd_of_whole(self.dense()) if self.factors is None else _svd_of_product(*self.factors)

    @property
    def rank(self) -> int:
        """The number of singular values that float32 resolves: rounding M to it moves each by less than eps ‖M‖_F."""
        resolved = _FLOAT32 * self.norm()
        return int((resolved < self.svd.S).sum())

    def norm(self) -> float:
        """‖M‖_F."""
        if self.factors is None:
            return float(torch.linalg.vector_norm(self.dense()))
        return float(torch.linalg.vector_norm(_core(*self.factors)[1]))


def effective_rank(matrix: Matrix) -> float:
    """exp(-Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σ: 1 where one direction holds all, the rank where all are alike; 0 for zero.

    Olivier Roy, Martin Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", 2007,
    https://infoscience.epfl.ch/handle/20.500.14299/9837
    """
    shares = matrix.svd.S / matrix.svd.S.sum()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0


def weighted_sum(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Σ wᵢ Mᵢ: where all are products, the product of [w₁ B₁, w₂ B₂, ...] and [A₁; A₂; ...]."""
    factors = [matrix.factors for matrix in matrices if matrix.factors is not None]
    if len(factors) < len(matrices):
        parts = [weight * matrix.dense() for weight, matrix in zip(weights, matrices, strict=True)]
        return Matrix(whole=torch.stack(parts).sum(0))
    As, Bs = [A for A, _ in factors], [weight * B for weight, (_, B) in zip(weights, factors, strict=True)]
    return Matrix(factors=(torch.cat(As), torch.cat(Bs, dim=1)))


def inner_product(one: Matrix, two: Matrix) -> float:
    """⟨M, N⟩ = tr(Mᵀ N)."""
    if one.factors is None or two.factors is None:
        return float((one.dense() * two.dense()).sum())
    (A, B), (C, D) = one.factors, two.factors
    return float(((B.T @ D) * (A @ C.T)).sum())


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """The cosines of the principal angles between the spaces of two sets of orthonormal columns, largest first.

    They are the singular values of UᵀU'. Åke Björck, Gene H. Golub, "Numerical Methods for Computing Angles Between
    Linear Subspaces", 1973, https://doi.org/10.2307/2005662
    """
    return torch.linalg.svdvals(one.T @ two).clamp(max=1.0)


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (out, k), C (k, l) and P (in, l), with orthonormal columns in Q and P, so that B A = Q C Pᵀ."""
    Q, R = torch.linalg.qr(B)
    P, S = torch.linalg.qr(A.T)
    return Q, R @ S.T, P


def _svd_of_product(A: Tensor, B: Tensor) -> SVD:
    Q, core, P = _core(A, B)
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    rounding = _FLOAT64 * len(A) * torch.linalg.vector_norm(A) * torch.linalg.vector_norm(B)
    found = rounding < S
    return SVD(Q @ U[:, found], S[found], P @ Vt.T[:, found])


def _svd_of_whole(matrix: Tensor) -> SVD:
    """From the eigenvectors of MᵀM or M Mᵀ, the smaller one: faster, and exact down to about 1e-7 of the largest."""
    if matrix.shape[0] < matrix.shape[1]:
        U, S, V = _svd_of_whole(matrix.T)
        return SVD(V, S, U)
    squares, V = torch.linalg.eigh(matrix.T @ matrix)
    squares, V = squares.flip(0), V.flip(1)
    found = squares > _FLOAT64 * len(squares) * squares[:1]
    S, V = squares[found].sqrt(), V[:, found]
    return SVD(matrix @ V / S, S, V)
