"Small details that matter, each checked by itself"
import numpy as np, pandas as pd, pytest, torch
from ensemble_learners import *
from fastai.tabular.all import Callback, mae
from torch import nn
from fastai_dropconnect import files
from fastai_dropconnect.all import *
from fastai_dropconnect.callback.zero_restarts import cosine_cycles
from fastai_dropconnect.compare import Fit, submission
from fastai_dropconnect.recipes import _summary
from fastai_dropconnect.sparsity.core import bit_mask, clean_optimizer
from fastai_dropconnect.tabular.embeddings import _is_frequent, quantile_bins

pytestmark = pytest.mark.filterwarnings('ignore')


def test_every_file_of_a_run_is_written_under_another_name_and_renamed(tmp_path, monkeypatch):
    written,renamed = [],[]
    write,rename = files.write_new,files.rename_file
    monkeypatch.setattr(files, 'write_new', lambda file, data: (written.append(file.name), write(file, data)))
    monkeypatch.setattr(files, 'rename_file', lambda old, new: (renamed.append((old.name, new.name)), rename(old, new)))
    make_learn(path=tmp_path).fit_zero_restarts(2, 1, path='run')
    assert len(written)>5 and all(n.endswith('.tmp') for n in written)
    assert [old for old,_ in renamed]==written
    assert {f.name for f in (tmp_path/'models'/'run').iterdir()} <= {new for _,new in renamed}


@pytest.mark.parametrize('cycle', [0, 1, None])
def test_only_the_optimizer_of_the_newest_cycle_goes_on(cycle):
    learn = make_learn()
    learn.fit_zero_restarts(2, 1, seed=1)
    ens = ensemble(learn)
    ens.record.progress['cycle'] = cycle
    saved = ens.record.progress['opt']['state'][0]['grad_avg']
    learn.opt.state[learn.model[0].weight]['grad_avg'] = torch.full_like(saved, 7)
    ens.resume()
    now = learn.opt.state[learn.model[0].weight]['grad_avg']
    assert torch.equal(now, saved if cycle==1 else torch.full_like(saved, 7))


@pytest.mark.parametrize('n', [1, 3, 7, 49, 98, 103, 1000])
def test_each_cycle_starts_at_the_highest_learning_rate(n):
    "Also where k/n*n is less than k, as 1/49*49 is"
    lr = cosine_cycles(.1, n)
    assert n!=49 or 1/49*49<1
    for k in range(n): assert lr(k/n)==pytest.approx(.1, rel=1e-6)
    assert n==1 or lr((1-1e-4)/n)<1e-6


@pytest.mark.parametrize('name,average,square', [('RMSprop','momentum_buffer','square_avg'), ('AdamW','exp_avg','exp_avg_sq'), ('NAdam','exp_avg','exp_avg_sq')])
def test_averages_of_squares_are_told_from_others(name, average, square):
    p = nn.Parameter(torch.randn(6))
    opt = getattr(torch.optim, name)([p], **(dict(momentum=.9) if name=='RMSprop' else {}))
    p.sum().backward()
    opt.step()
    clean_optimizer(opt, {p: bit_mask(torch.arange(6)<3, p)}, square=1.)
    state = opt.state[p]
    assert state[square][3:].tolist()==[1.]*3 and state[average][3:].tolist()==[0.]*3
    assert not (state[square][:3]==1).any() and state[average][:3].all()


def test_prices_of_several_fits_are_averaged_as_logarithms():
    fits = [Fit('a', seed, np.zeros(1), 0., 0., new_preds=np.log([price])) for seed,price in enumerate([100., 10000.])]
    assert submission(pd.DataFrame(dict(SalesID=[5])), fits, 'a').SalePrice.tolist()==[1000.]


def test_a_value_with_exactly_the_rows_of_a_bin_fills_one_alone():
    assert _is_frequent(np.array([1.,2,3]), np.array([5,3,2]), 2).tolist()==[True,False,False]
    assert _is_frequent(np.array([1.,2,3]), np.array([4,3,3]), 2).tolist()==[False]*3
    x = np.r_[[0.]*10, np.arange(1, 11)]
    assert 0. in quantile_bins(x[:,None], 2)[0]


@pytest.mark.parametrize('k', [2, 5])
@pytest.mark.parametrize('average', ['softmax','sigmoid'])
def test_the_average_of_probabilities_is_a_logit(k, average):
    x = torch.randn(7, k, 4)
    act = (lambda t: t.softmax(-1)) if average=='softmax' else torch.sigmoid
    out = average_members(x, average)
    torch.testing.assert_close(act(out), act(x).mean(1))
    if average=='softmax': torch.testing.assert_close(out.exp().sum(-1), torch.ones(7))     # as those of `log_softmax` do


def test_training_metrics_of_members_are_detached():
    class Watch(Callback):
        seen = ()
        def after_batch(self):
            if self.training: self.seen += (self.learn.pred.requires_grad, self.learn.pred.ndim),
    learn = tabular(config=tabular_dropconnect_config(members=3), metrics=mae)
    learn.recorder.train_metrics = True
    learn.add_cb(watch := Watch())
    learn.fit(1, 1e-3)
    assert set(watch.seen)=={(False,2)}


def test_the_table_of_a_choice_shows_the_spread_over_seeds():
    fits = [dict(recipe=n, loss=loss, seconds=1.) for n,loss in (('a',1.), ('a',3.), ('b',2.), ('b',2.5))]
    table = _summary(fits, ['a','b'], 'loss', 1)
    assert table.loss.tolist()==[2.,2.25] and table.sd.tolist()==pytest.approx([2**.5, .125**.5]) and table.chosen.tolist()==[True,False]
    assert _summary(fits[::2], ['a','b'], 'loss', 1).sd.isna().all()
