"""The polynomial of `lowering.short_erf`: finds its coefficients, and says how far results are from the truth.

    python benchmarks/erfc_polynomial.py

Of all polynomials a * P(a) of the degree it is the one with the least largest error of 2^(a * P(a)) against erfc(a), counted in
what is allowed at each a (`allowed`). It is found by least squares whose weights grow where the error is large (C. L. Lawson,
Contributions to the Theory of Linear Least Maximum Approximation, 1961), in Chebyshev polynomials, which keep the equations well
conditioned.
"""

from __future__ import annotations

import math

import torch

DEGREE = 8
"""The least whose last coefficient is negative, so that the function falls for ever, and whose error half precision hides."""
MOST = 4.5
"""Behind it erfc is below 2e-10, and what is left of it is lost beside one or multiplied by less than 10."""
POINTS, ROUNDS = 4001, 400


def allowed(erfc: torch.Tensor) -> torch.Tensor:
    """An error that nobody sees in half precision."""
    return 1e-6 * erfc + 1e-9


def log2_erfc(a: torch.Tensor) -> torch.Tensor:
    return torch.special.erfcx(a).log2() - a * a / math.log(2.0)


def fit() -> torch.Tensor:
    """The coefficients of 1, a, a^2 and so on, float64."""
    u = torch.linspace(0, math.pi, POINTS, dtype=torch.float64).cos()
    a = (u + 1) * (MOST / 2)
    u, a = u[a > 1e-6], a[a > 1e-6]
    angle = u.arccos()
    chebyshev = torch.stack([(k * angle).cos() for k in range(DEGREE)], 1)
    erfc = torch.special.erfc(a)
    most = allowed(erfc) / (erfc * math.log(2.0))  # in the exponent
    rows, wanted = chebyshev * (a / most)[:, None], log2_erfc(a) / most
    weights = torch.ones_like(a)
    best = (math.inf, torch.zeros(DEGREE, dtype=torch.float64))
    for _ in range(ROUNDS):
        root = weights.sqrt()
        found = torch.linalg.lstsq(rows * root[:, None], (wanted * root)[:, None], driver="gelsd").solution[:, 0]
        error = (rows @ found - wanted).abs()
        if error.max() < best[0]:
            best = (error.max().item(), found)
        weights = (weights * error / (weights * error).mean()).clamp(min=1e-12)
    return torch.cat([torch.zeros(1, dtype=torch.float64), in_powers(best[1])])


def in_powers(chebyshev: torch.Tensor) -> torch.Tensor:
    """From Chebyshev polynomials of u = 2 a / MOST - 1 to powers of a."""
    one = torch.zeros(DEGREE, dtype=torch.float64)
    one[0] = 1.0

    def times_u(p: torch.Tensor) -> torch.Tensor:
        return 2.0 / MOST * torch.cat([p.new_zeros(1), p[:-1]]) - p

    terms = [one, times_u(one)]
    while len(terms) < DEGREE:
        terms.append(2 * times_u(terms[-1]) - terms[-2])
    return chebyshev @ torch.stack(terms)


def main() -> None:
    coefficients = fit().float()
    print("coefficients:", coefficients.tolist())
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        truth = x.double() * 0.5 * torch.special.erfc(-x.double() * math.sqrt(0.5))
        finite = truth.isfinite()
        z = x.float() * math.sqrt(0.5)
        exponent = torch.zeros_like(z)
        for coefficient in reversed(coefficients[1:].tolist()):
            exponent = (exponent + coefficient) * z.abs()
        one_plus_erf = torch.where(z < 0, exponent.exp2(), 2 - exponent.exp2())
        for name, value in (("by this", one_plus_erf), ("by erf", 1 + z.erf())):
            wrong = ((x.float() * 0.5 * value).to(dtype) != truth.to(dtype)) & finite
            print(f"{dtype}: of {finite.sum()} values of GELU {wrong.sum()} are not the nearest number, {name}")


if __name__ == "__main__":
    main()
