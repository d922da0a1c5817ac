import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.kernels.attention import Visible, attention
from kvlib.kernels.column_mass import column_mass
from tests.reference import causal, reference


@given(st.integers(1, 40), st.integers(0, 30), st.sampled_from([1, 2, 4]), st.booleans())
def test_two_passes_equal_the_columns_of_a_softmax(n, older, group, capped):
    torch.manual_seed(n)
    keys, softcap = n + older, 3.0 if capped else None
    q, k, v = torch.randn(2, 2 * group, n, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    visible = Visible(causal=True)
    lse = attention(q, k, v, 0.5, visible, softcap).lse
    mass = column_mass(q, k, lse, 0.5, visible, softcap)
    p = reference(q, k, v, 0.5, causal(n, keys), softcap)[2]
    torch.testing.assert_close(mass.double(), p.view(2, 2, -1, keys).sum(2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), float(group * n)), atol=1e-4, rtol=1e-4)


def test_queries_of_padding_do_not_vote():
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    visible = Visible(causal=True, start=torch.tensor([2]))
    lse = attention(q, k, v, 0.5, visible).lse
    assert (lse[:, :, :2] == float("-inf")).all()
    mass = column_mass(q, k, lse, 0.5, visible)
    assert torch.equal(mass[..., :2], torch.zeros(1, 1, 2))
    torch.testing.assert_close(mass.sum(), torch.tensor(2.0 * 4))
