import copy
import pytest, torch
from fastai.learner import load_learner
from fastai.tabular.all import TabularModel, tabular_learner as fastai_learner
from conftest import make_table
from fastai_dropconnect.all import *
from fastai_dropconnect.serialize.predictor import load_predictor
from fastai_dropconnect.sparsity.compact import CompactModel, compact
from fastai_dropconnect.layers.drop_path import DropPath
from fastai_dropconnect.tabular.resnet import ResidualBlock, TabularResNetModel, model_class, tabular_resnet_config


def quiet_fit(learn, n=1):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, 1e-2)
    return learn


@pytest.mark.parametrize('kw', [{}, dict(num_embeddings='ple', path_p=.2), dict(weight_p=.2, mode='gaussian', embed_p=.1, embed_weight_p=.1, y_range=(-3,9))], ids=str)
def test_trains_loads_exports_and_predicts_one_row(dls, tmp_path, kw):
    learn = quiet_fit(tabular_learner(dls, layers=[8,8,8], config=tabular_resnet_config(width=16, **kw), path=tmp_path))
    assert type(learn.model) is TabularResNetModel and torch.stack(learn.recorder.losses).isfinite().all()
    assert [m.p for m in learn.model.modules() if isinstance(m, DropPath)] == pytest.approx([kw.get('path_p', 0)*i/2 for i in range(3)])
    with learn.no_bar():
        preds = learn.get_preds()[0]
        learn.save('m')
        learn.export('m.pkl')
        again = load_learner(tmp_path/'m.pkl')
        test = again.dls.test_dl(make_table()[480:])
        with again.no_bar(): assert torch.allclose(again.get_preds(dl=test)[0], preds, atol=1e-6)
        quiet_fit(learn).load('m')
        assert torch.equal(learn.get_preds()[0], preds)
    assert learn.model.eval()(*[t[:1] for t in dls.one_batch()[:2]]).shape==(1,1)
    low,high = kw.get('y_range', (-99,99))
    assert (preds>low).all() and (preds<high).all()


def test_only_categories_only_numbers_no_blocks():
    for emb,n_cont in (([(4,2)],0), ([],3)):
        for layers in ([], [5], [5,6]):
            model = TabularResNetModel(emb, n_cont, 2, layers, width=7, path_p=.3, weight_p=.1)
            assert model(torch.zeros(4, len(emb)).long(), torch.randn(4, n_cont)).shape==(4,2)
            assert len([m for m in model.modules() if isinstance(m, ResidualBlock)])==len(layers)


def test_a_block_is_its_input_plus_a_branch_and_paths_drop_whole_rows():
    block,x = ResidualBlock(6, 9, path_p=.5).eval(),torch.randn(50, 6)
    branch = block.second(block.first(block.norm(x)).relu())
    assert torch.allclose(block(x), x+branch)
    block.drop_path.train()
    added = (block(x)-x)
    dropped = added.eq(0).all(1)
    assert 10<dropped.sum()<40 and torch.allclose(added[~dropped], 2*branch[~dropped], atol=1e-5)


def test_the_fast_path_looks_up_embeddings_in_one_pass(dls, monkeypatch):
    learn = tabular_learner(dls, layers=[8], config=tabular_resnet_config(width=8), fast=True)
    called = []
    from fastai_dropconnect.tabular import one_pass
    monkeypatch.setattr(one_pass, 'embed_columns', lambda e, x: called.append(1) or torch.cat([m(x[:,i]) for i,m in enumerate(e)], 1))
    quiet_fit(learn)
    assert called


@pytest.mark.parametrize('kw', [dict(width=0), dict(path_p=1), dict(weight_p=-1), dict(mode='rows'), dict(dropout=2), dict(embed_p=1), dict(num_embeddings='x'), dict(embed_weight_p=1)], ids=str)
def test_bad_arguments(kw):
    name = next(iter(kw))
    with pytest.raises(ValueError, match=f'`{name}` must be'): tabular_resnet_config(**kw)
    with pytest.raises(ValueError, match=f'`{name}` must be'): TabularResNetModel([], 2, 1, [4], **kw)


def test_bad_layers_and_fastais_learner(dls):
    with pytest.raises(ValueError, match='layers=0'): TabularResNetModel([], 2, 1, [0])
    with pytest.raises(TypeError, match='fastai_dropconnect'): fastai_learner(dls, config=tabular_resnet_config())
    assert model_class(dict(ps=[.1])) is TabularModel and model_class(copy.copy(tabular_resnet_config())) is TabularResNetModel


@pytest.mark.parametrize('kind', ['resnet','compact resnet','compact plain','compact members'])
def test_saved_without_pickle(dls, tmp_path, kind):
    "Residual and compact networks predict the same after `load_model`, and without torch"
    configs = {'resnet': tabular_resnet_config(width=8, path_p=.1, y_range=(-3,9)), 'plain': None, 'members': tabular_dropconnect_config(members=2)}
    learn = quiet_fit(tabular_learner(dls, layers=[8,6], config=configs[kind.split()[-1]]))
    if 'compact' in kind:
        first = next(m for m in learn.model.layers.modules() if isinstance(m, torch.nn.Linear))
        first.weight.data[:,:learn.model.embeds[0].embedding_dim] = 0       # the first column
        first.weight.data[1] = 0
        small = compact(learn.model)
        assert isinstance(small, CompactModel) and small.columns[0] is not None
        learn = type(learn)(dls, small, loss_func=learn.loss_func, cbs=[cb for cb in learn.cbs if 'Average' in type(cb).__name__ and not learn.remove_cb(cb)])
    with learn.no_bar(): preds = learn.get_preds()[0]
    again = load_model(save_model(learn, tmp_path/'m'))
    rows = make_table()[480:]
    with again.no_bar(): assert torch.allclose(again.get_preds(dl=again.dls.test_dl(rows))[0], preds, atol=1e-6)
    assert type(again.model) is type(learn.model)
    assert abs(load_predictor(tmp_path/'m').predict_rows(rows.to_dict('records'))-preds.numpy()).max() < 1e-5
