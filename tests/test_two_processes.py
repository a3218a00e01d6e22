"Callbacks in fastai's `distrib_ctx`: two processes train one network"
from textwrap import dedent

DROPCONNECT = '''
    from test_callback_dropconnect import make_learn, state, snapshot, same, DropConnect, Callback
    class Draws(Callback):
        def after_pred(self):
            if self.training: self.out = [type(self.learn.model.module[0]).__name__, self.learn.model.module[0](torch.ones(1,4)).tolist()]
    learn = make_learn(DropConnect(.5), Draws(), seed=rank)
    before = state(learn.model)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2)
    assert state(learn.model)==before
    both = gather((snapshot(learn), learn.draws.out))
    assert same(both[0][0], both[1][0]) and both[0][1][0]=='NoisyLinear' and both[0][1][1]!=both[1][1][1]
'''
ZEROS = '''
    from test_callback_frozen_zero import make_learn, masked, hidden, FrozenZeroInit, Watch
    for zero in (True,False):
        learn = make_learn(FrozenZeroInit(.5, zero=zero), Watch(), seed=rank, opt_func=ranger)
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2)
        both = gather((masked(learn), [w.detach() for w in hidden(learn)]))
        for a,b in zip(*both):
            for x,y in zip(a, b): assert torch.equal(x, y), (rank, x, y)
        if zero: assert all((w[m]==0).all() for m,w in zip(*both[rank]))
        assert all(m.float().mean()==.5 for m in both[rank][0])
'''
GATES = '''
    from test_callback_gates import *
    learn = make_learn(FeatureGates(20, end=.6))
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, 1e-2)
    cb = learn.feature_gates
    a,b = gather([cb.record.state['log_alpha'].tolist(), weight(learn).tolist()])
    assert a==b and cb.record.state['fixed'] and is_plain(learn)
'''

def test_both_processes_have_the_masks_zeros_and_gates_of_one_network(two_processes):
    "One pair of processes for all of them: each takes eight seconds to import the package"
    two_processes(''.join(map(dedent, (DROPCONNECT,ZEROS,GATES))))
