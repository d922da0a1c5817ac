import pytest
import torch

from kvlib.kernels.fused import fused, in_two, serves
from tests.kernels.poison import error
from tests.reference import reference


def on_cpu(q, k, v, scale, causal):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [7, 8, 40])
def test_later_chunks_of_a_prompt_see_what_came_before(keys, causal):
    q, k, v = torch.randn(2, 6, 7, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
    out, lse = in_two(q, k, v, 0.3, causal, on_cpu)
    slot = torch.arange(keys)
    seen = slot <= torch.arange(keys - 7, keys)[:, None] if causal else torch.ones(7, keys, dtype=torch.bool)
    wanted, total, _ = reference(q, k, v, 0.3, seen.expand(2, 1, -1, -1))
    assert error(out, wanted) < 1e-6
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-6)


def test_what_no_fused_kernel_serves():
    q = torch.randn(1, 2, 8, 16)
    assert not serves(q, q, q, None)  # on the CPU products of blocks are as fast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fused prompt kernels run on CUDA only")
@pytest.mark.parametrize("keys", [100, 300])
def test_on_a_gpu(keys):
    q, k = (torch.randn(2, h, n, 64, dtype=torch.float16, device="cuda") for h, n in ((8, 100), (2, keys)))
    v = torch.randn_like(k)
    assert serves(q, k, v, None)
    out, lse = fused(q, k, v, 0.125, None, causal=True)
    seen = torch.arange(keys) <= torch.arange(keys - 100, keys)[:, None]
    wanted, total, _ = reference(q.cpu().double(), k.cpu().double(), v.cpu().double(), 0.125, seen.expand(2, 1, -1, -1))
    assert error(out, wanted) < 2e-3
    assert (lse.cpu().double() - total).abs().max() < 5e-3
