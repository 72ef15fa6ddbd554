"""Error feedback: exact against a plain reference, never stale ranges, and better than rounding each weight alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from makeweight.numerics.gptq import feedback_codes, feedback_factor
from makeweight.numerics.grid import qparams, ranges
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.svd import LinAlgError

ROWS, WIDTH, TOKENS = 12, 48, 400


def a_layer(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return weights, and inputs that are strongly correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(4)
    weight_OI = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    sizes_I = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    inputs_TI = torch.randn(TOKENS, width, generator=generator, dtype=torch.float64) @ mix_II * sizes_I
    return weight_OI, inputs_TI


def of(scheme: Scheme):  # noqa: ANN201
    return lambda part_OS, _: qparams(*ranges(part_OS), scheme, torch.float32)


def plain(
    weight_OI: Tensor, hessian_II: Tensor, scheme: Scheme, group: int, *, order: list[int], fixed: bool
) -> Tensor:
    """Feed errors back one column at a time with the inverse of what is left, as the derivation has it."""
    weight_OI, left = weight_OI.clone(), set(order)
    out_OI = torch.empty_like(weight_OI)
    parts = [of(scheme)(part_OS, 0) for part_OS in weight_OI.split(group, 1)]
    for i in order:
        if not fixed and i % group == 0:
            parts[i // group] = of(scheme)(weight_OI[:, i : i + group], 0)
        scale_O, zero_O = parts[i // group]
        code_O = (weight_OI[:, i] / scale_O + zero_O).round().clamp(scheme.qmin, scheme.qmax)
        out_OI[:, i] = (code_O - zero_O) * scale_O
        free = sorted(left)
        inverse_FF = hessian_II[free][:, free].inverse()
        own = free.index(i)
        error_O = (weight_OI[:, i] - out_OI[:, i]) / inverse_FF[own, own]
        weight_OI[:, free] -= error_O[:, None] * inverse_FF[own]
        left.remove(i)
    return out_OI


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("width", "group"), [(48, 16), (48, 48), (320, 160), (288, 96), (260, 260)])
@pytest.mark.parametrize(
    ("act_order", "static_groups"), [(True, False), (False, True), (False, False)], ids=["act-order", "static", "live"]
)
def test_equals_the_derivation(width: int, group: int, symmetric: bool, act_order: bool, static_groups: bool) -> None:
    scheme = Scheme(bits=3, group_size=group, symmetric=symmetric)
    weight_OI, inputs_TI = a_layer(width)
    hessian_II = inputs_TI.T @ inputs_TI
    codes_OI, scale_OG, zero_OG, damp = feedback_codes(
        weight_OI, hessian_II, scheme, group, of(scheme), act_order=act_order, damp=0.01, static_groups=static_groups
    )
    assert damp == 0.01
    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    got_OI = ((codes_OI.unflatten(1, (-1, group)) - zero_OG[..., None]) * scale_OG[..., None]).flatten(1)
    order = sorted(range(width), key=lambda i: -float(hessian_II[i, i])) if act_order else list(range(width))
    expected_OI = plain(weight_OI, damped_II, scheme, group, order=order, fixed=act_order or static_groups)
    torch.testing.assert_close(got_OI, expected_OI, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_are_nearer_than_by_rounding_alone(act_order: bool) -> None:
    scheme = Scheme(bits=3, group_size=16)
    weight_OI, inputs_TI = a_layer()
    scale_OG, zero_OG = qparams(*ranges(weight_OI.unflatten(1, (-1, 16))), scheme, torch.float32)
    alone_OGS = (weight_OI.unflatten(1, (-1, 16)) / scale_OG[..., None] + zero_OG[..., None]).round()
    alone_OI = ((alone_OGS.clamp(scheme.qmin, scheme.qmax) - zero_OG[..., None]) * scale_OG[..., None]).flatten(1)
    codes_OI, scale_OG, zero_OG, _ = feedback_codes(
        weight_OI, inputs_TI.T @ inputs_TI, scheme, 16, of(scheme), act_order=act_order, damp=0.01
    )
    fed_OI = ((codes_OI.unflatten(1, (-1, 16)) - zero_OG[..., None]) * scale_OG[..., None]).flatten(1)
    error, error_alone = (float(((w - weight_OI) @ inputs_TI.T).norm()) for w in (fed_OI, alone_OI))
    assert error < 0.85 * error_alone


def test_static_groups_keep_the_ranges_of_the_weights() -> None:
    scheme = Scheme(bits=4, group_size=16)
    weight_OI, inputs_TI = a_layer()
    _, scale_OG, zero_OG, _ = feedback_codes(
        weight_OI, inputs_TI.T @ inputs_TI, scheme, 16, of(scheme), act_order=True, damp=0.01
    )
    expected = qparams(*ranges(weight_OI.unflatten(1, (-1, 16))), scheme, torch.float32)
    assert torch.equal(scale_OG, expected[0]) and torch.equal(zero_OG, expected[1])


def test_inputs_that_never_come() -> None:
    scheme = Scheme(bits=3, group_size=16)
    weight_OI, inputs_TI = a_layer()
    inputs_TI[:, 5] = 0
    codes_OI, _, zero_OG, _ = feedback_codes(
        weight_OI, inputs_TI.T @ inputs_TI, scheme, 16, of(scheme), act_order=True, damp=0.01
    )
    assert torch.equal(codes_OI[:, 5], zero_OG[:, 0]), "the code of zero"


def test_inputs_that_never_come_do_not_raise_the_damping() -> None:
    weight_OI, inputs_TI = a_layer()
    inputs_TI[:, ::6] = 0
    scheme, hessian_II = Scheme(bits=3, group_size=16), inputs_TI.T @ inputs_TI
    large, small = (
        feedback_codes(weight_OI, size * hessian_II, scheme, 16, of(scheme), act_order=True, damp=0.01)[0]
        for size in (1.0, 1e-6)
    )
    assert torch.equal(large, small)


def test_damping_grows_until_there_is_an_inverse() -> None:
    factor_II, damp = feedback_factor(torch.eye(4), 0.01)
    assert damp == 0.01
    torch.testing.assert_close(factor_II, torch.eye(4) / 1.01**0.5)
    poor_II = torch.eye(4) - 0.4 * torch.ones(4, 4)  # its smallest eigenvalue is -0.6, the mean of its diagonal 0.6
    with pytest.raises(LinAlgError, match="no inverse"):
        feedback_factor(poor_II - torch.eye(4) * 0.5, 0.01)
    slightly_II = torch.eye(4) - 0.26 * torch.ones(4, 4)  # -0.04 and 0.74: a tenth of the mean is enough
    assert feedback_factor(slightly_II, 0.01)[1] == pytest.approx(0.1)
