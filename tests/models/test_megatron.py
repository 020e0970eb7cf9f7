"""Megatron's and MT-NLG's published sizes, and what each stage of their pipelines computes."""

import pytest

from lm.models import params as P
from lm.models.families.gpt2 import FAMILY, gpt2
from lm.train.analytic import stage_flops


def closed_form(V: int, T: int, D: int, L: int) -> int:
    """Attention 4 D^2 + 4 D, feed-forward 8 D^2 + 5 D, two norms 4 D; tables; the last norm."""
    return L * (12 * D**2 + 13 * D) + (V + T) * D + 2 * D


@pytest.mark.ledger("P094")
def test_megatron_count():
    """72 layers of 24 heads of 128."""
    count = P.count(FAMILY.preset("megatron-8.3b"))
    assert count == closed_form(50257, 1024, 3072, 72) == 8_314_143_744
    assert f"{count / 1e9:.2f}" == "8.31"


@pytest.mark.ledger("P073", "L29")
def test_mt_nlg_count():
    """105 layers of 128 heads of 160."""
    count = P.count(FAMILY.preset("mt-nlg-530b"))
    assert count == closed_form(50257, 2048, 20480, 105) == 529_581_506_560
    assert f"{count / 1e9:.1f}" == "529.6"


@pytest.mark.ledger("P025")
@pytest.mark.parametrize("vocab_size", [256_000, 256_003])
def test_stages_compute_as_much(vocab_size):
    """Eight stages of 32 layers of 3072 features, by hand, with the vocabulary divided or not."""
    D, L, T, stages = 3072, 32, 2048, 8
    params = P.abstract(gpt2(vocab_size, T, D, 24, L))
    layers = 6 * L * 12 * D**2 + 12 * L * D * T
    naive = stage_flops(params, T, stages, divided=False)
    assert naive[:-1] == [layers / 8] * 7
    assert naive[-1] == layers / 8 + 6 * D * vocab_size
    balanced = stage_flops(params, T, stages)
    assert sum(balanced) == pytest.approx(sum(naive), rel=1e-12)
    naive_ratio, ratio = (max(flops) * stages / sum(flops) for flops in (naive, balanced))
    print(
        f"V={vocab_size}: the busiest stage computes {naive_ratio:.3f} times the mean; {ratio:.6f}"
    )
    assert ratio <= 1.05 < naive_ratio
