"""Ranges chosen from the weights: by search, each as its input counts, at quantiles, by half-quadratic splitting.

Shapes: O out, G groups per row, S inputs per group, K extreme weights of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from makeweight.numerics.grid import qparams, ranges, to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.slabs import Rows, by_rows
from makeweight.numerics.stepgrid import stored

BETA, GROWTH = 10.0, 1.01
"""Weight of the split's quadratic term at first, and what it grows by; those of hqq."""
SMALLEST = 1e-12
"""A residual, in steps, that counts as none."""
CHUNK = 1 << 22
"""Weights that are split at a time."""


@torch.no_grad()
def best_factors(
    weight_OGS: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    shares: Iterable[float],
    error: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the share of each group's range, both ends alike, with the smallest error, (O, G).

    `error` scores w_hat - w, row by row, which it may overwrite, (O, G, S) to (O, G). The first of equals wins. Rows
    are taken a few at a time: memory is that of these, however many the shares.
    Source: the range search of GPTQ's reference code; AWQ's clip search with an error over inputs.
    """
    shares = list(shares)

    def search(part_OGS: Tensor) -> Rows:
        low_OG, high_OG = ranges(part_OGS)
        factor_OG, best_OG = torch.ones_like(low_OG), torch.full_like(low_OG, torch.inf)
        for share in shares:
            scale_OG, zero_OG = qparams(low_OG * share, high_OG * share, scheme, scale_dtype)
            delta_OGS = to_codes(part_OGS, scale_OG, zero_OG, scheme)
            delta_OGS.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1)).sub_(part_OGS)
            error_OG = error(delta_OGS)
            better_OG = error_OG < best_OG
            best_OG = torch.where(better_OG, error_OG, best_OG)
            factor_OG.masked_fill_(better_OG, share)
        return (factor_OG,)

    (factor_OG,) = by_rows(search, weight_OGS)
    assert factor_OG is not None
    return factor_OG


def power_error(delta_OGS: Tensor, power: float, counts_GS: Tensor | None = None) -> Tensor:
    """Return the sum of |delta|^power over each group, each as often as `counts_GS` says, (O, G); overwrites delta."""
    error_OGS = delta_OGS.square_() if power == 2 else delta_OGS.abs_().pow_(power)
    return (error_OGS if counts_GS is None else error_OGS.mul_(counts_GS)).sum(-1)


@torch.no_grad()
def quantile_factors(weight_OGS: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the factors that bring the ends of each range to the quantiles 1 - share and share, both (O, G).

    Between two weights a quantile is interpolated. An end at zero keeps the factor 1, and a group that would be left
    with no range keeps all of it.
    """
    low_OG, high_OG = ranges(weight_OGS)
    low_factor_OG = (-_upper_quantile(-weight_OGS, share) / low_OG).clamp_(0, 1).masked_fill_(low_OG == 0, 1)
    high_factor_OG = (_upper_quantile(weight_OGS, share) / high_OG).clamp_(0, 1).masked_fill_(high_OG == 0, 1)
    none_OG = (low_OG * low_factor_OG == 0) & (high_OG * high_factor_OG == 0)
    return low_factor_OG.masked_fill_(none_OG, 1), high_factor_OG.masked_fill_(none_OG, 1)


def _upper_quantile(weight_OGS: Tensor, share: float) -> Tensor:
    size = weight_OGS.shape[-1]
    place = (1 - share) * (size - 1)  # 0 for the largest weight, 1 for the next
    above = int(place)
    top_OGK = weight_OGS.topk(min(above + 2, size)).values
    return torch.lerp(top_OGK[..., above], top_OGK[..., min(above + 1, size - 1)], place - above)


@torch.no_grad()
def half_quadratic(
    weight_OGS: Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, power: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Return scales and integer zero-points, both (O, G), that make sum |w - w_hat|^power small, power below 1.

    Starts from round-to-nearest and is never worse for any group; w is split into a part on the grid and outliers e:
    e shrinks the residual r, in steps, to sign(r) max(|r| - |r|^(power - 1) / beta, 0), then the zero-point and the
    scale are the least squares of codes and w - e, and beta grows. Stops once no group gets better.
    Source: Badri and Shaji, Half-Quadratic Quantization, 2023 (Mobius Labs). There the scale is fixed and the
    zero-point a float; an integer one hardly moves, so the scale is solved for as well. Residuals in steps are ours.
    """
    rows = max(1, CHUNK // weight_OGS[0].numel())
    parts = [_split(part_OGS, scheme, scale_dtype, power, steps) for part_OGS in weight_OGS.split(rows)]
    scale_OG, zero_OG = (torch.cat(found) for found in zip(*parts, strict=True))
    return scale_OG, zero_OG


def _split(
    weight_OGS: Tensor, scheme: Scheme, scale_dtype: torch.dtype, power: float, steps: int
) -> tuple[Tensor, Tensor]:
    scale_OG, zero_OG = best = qparams(*ranges(weight_OGS), scheme, scale_dtype)
    least_OG, beta = torch.full_like(scale_OG, torch.inf), BETA
    for _ in range(steps + 1):
        codes_OGS = to_codes(weight_OGS, scale_OG, zero_OG, scheme)
        codes_OGS.sub_(zero_OG.unsqueeze(-1))  # from here on in steps from zero
        rest_OGS = (weight_OGS / scale_OG.unsqueeze(-1)).sub_(codes_OGS)
        size_OGS = rest_OGS.abs().clamp_(min=SMALLEST)
        pull_OGS = size_OGS.pow(power - 1)
        error_OG = power_error(codes_OGS * scale_OG.unsqueeze(-1) - weight_OGS, power)  # as it will be read
        better_OG = error_OG < least_OG
        if not better_OG.any():
            break
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best = (torch.where(better_OG, scale_OG, best[0]), torch.where(better_OG, zero_OG, best[1]))
        rest_OGS.sub_(size_OGS.sub_(pull_OGS, alpha=1 / beta).clamp_(min=0).copysign_(rest_OGS))
        scale_OG, zero_OG = _least_squares(codes_OGS, rest_OGS, scale_OG, zero_OG, scheme, scale_dtype)
        beta *= GROWTH
    return best


def _least_squares(
    codes_OGS: Tensor, rest_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fit the zero-point, rounded, then the scale to codes + rest, all in steps from zero."""
    wanted_OGS = rest_OGS + codes_OGS
    moved_OG = (zero_OG - rest_OGS.mean(-1)).round_().clamp_(scheme.qmin, scheme.qmax)
    codes_OGS = codes_OGS + (zero_OG - moved_OG).unsqueeze(-1)
    ratio_OG = (wanted_OGS * codes_OGS).sum(-1) / codes_OGS.square().sum(-1)
    ratio_OG = torch.where(ratio_OG > 0, ratio_OG, 1)  # no code but that of zero
    return stored(scale_OG * ratio_OG, moved_OG, scheme, scale_dtype)
