"The group lasso's penalty and its proximal step"
import pytest, torch
from fastai_dropconnect.sparsity.penalty import column_norms, group_lasso, proximal_step_, row_norms


@pytest.mark.parametrize('shape', [(5,3), (4,3,2,2)], ids=['linear','conv'])
def test_norms(shape):
    w = torch.randn(shape)
    assert torch.allclose(row_norms(w), torch.stack([r.norm() for r in w]))
    assert torch.allclose(column_norms(w), torch.stack([w[:,i].norm() for i in range(shape[1])]))


@pytest.mark.parametrize('prices', [dict(l1=.3), dict(li=.4), dict(lo=.5)], ids=lambda p: next(iter(p)))
def test_the_proximal_step_minimizes_penalty_plus_distance(prices):
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.float64)
    best = w.clone()
    proximal_step_(best, .7, **prices)
    def cost(v): return (.7*group_lasso([v], **prices) + .5*(v-w).square().sum()).item()
    least = cost(best)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(20): assert cost(best + scale*torch.randn_like(w)) > least


def test_gradients_are_finite_at_zero():
    w = torch.zeros(3, 4, requires_grad=True)
    group_lasso([w], .1, .1, .1).backward()
    assert (w.grad==0).all()
