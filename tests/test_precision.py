"""benchmarks/precision.py: what is rounded, to how many bits, and that nothing else is."""

import csv
import sys

import pytest
import torch

from benchmarks import precision
from tests.test_distilling import folder  # noqa: F401

x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 10


def test_seven_bits_are_bfloat16():
    assert torch.equal(precision.rounded(x, 7), x.bfloat16().float())
    assert torch.equal(precision.rounded(x, 23), x)
    assert torch.equal(precision.rounded(x.T, 7), x.T.bfloat16().float())  # not contiguous


def test_ten_bits_are_tf32():
    """To the nearest of the numbers with ten bits of mantissa, ties to the even one."""
    step = 2.0**-10
    for value, kept in ((1 + step, 1 + step), (1 + 0.4 * step, 1), (1 + 0.6 * step, 1 + step), (1 + 0.5 * step, 1),
                        (1 + 1.5 * step, 1 + 2 * step), (-1 - 0.6 * step, -1 - step), (2 - 0.1 * step, 2)):  # fmt: skip
        assert precision.rounded(torch.tensor([value]), 10).item() == kept
    assert ((precision.rounded(x, 10) - x).abs() <= x.abs() * step / 2).all()


@pytest.mark.parametrize("shapes", [((5, 33), (33, 7)), ((3, 5, 33), (3, 33, 7))])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_takes_rounded_factors(shapes, bias):
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes)
    added = torch.full((7,), 0.123456789)
    multiply = (torch.baddbmm if a.ndim == 3 else torch.addmm) if bias else torch.matmul
    inputs = [added.expand(*a.shape[:-1], 7)] * bias + [a, b]
    with precision.Precision("bfloat16"):
        product, tanh = multiply(*inputs), torch.tanh(a)
    exact = multiply(*inputs[:-2], a.bfloat16().float(), b.bfloat16().float())
    assert torch.equal(product, exact.bfloat16().float()) and torch.equal(tanh, torch.tanh(a))
    with precision.Precision("tf32"):
        product = multiply(*inputs)
    rounded = multiply(*inputs[:-2], precision.rounded(a, 10), precision.rounded(b, 10))
    assert torch.equal(product, rounded) and not torch.equal(product, multiply(*inputs))


def test_study(folder, tmp_path, monkeypatch):  # noqa: F811
    """float32's row is exact, and fewer bits lose more; both settings, every column a number."""
    out = tmp_path / "precision.csv"
    monkeypatch.setattr(sys, "argv", ["precision", str(folder), "--out", str(out), "--states", "40"])
    precision.main()
    rows = list(csv.DictReader(open(out, newline="")))
    assert [(row["settings"], row["precision"]) for row in rows] == [
        (s, p) for s in precision.SETTINGS for p in precision.BITS
    ]
    for full, tf32, bfloat16 in (rows[:3], rows[3:]):
        for column in ("kept", "best", "gain", "winner"):
            assert float(full[column]) == 1
        for column in ("sample_moved", "policy_loss", "critic_loss"):
            assert 0 == float(full[column]) < float(bfloat16[column])
        assert 0 < float(tf32["sample_moved"]) < float(bfloat16["sample_moved"])
