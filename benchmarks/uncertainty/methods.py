"Networks of the comparison: how each is made and what it predicts"
import time
from dataclasses import dataclass, field
import numpy as np, pandas as pd
from fastai.callback.core import CancelValidException
from fastai.tabular.all import Callback, Categorify, CategoryBlock, Normalize, RegressionBlock, TabularPandas, set_seed
from fastai_dropconnect.all import *
from fastai_dropconnect.callback import mc      # noqa: F401, gives every Learner `get_mc_preds`
from fastai_dropconnect.callback.calibrate import predicted
from .data import Data

LEVELS = np.arange(1, 20)/20        # .05 to .95
PASSES,P = 50,.1


@dataclass
class Prediction:
    "What a method says about some rows, in the unit of the target"
    mean:np.ndarray                     # (n_rows,); for classes probabilities of class 1
    spread:np.ndarray=None              # (n_rows,), standard deviation of members or passes
    sd:np.ndarray=None                  # (n_rows,), of a predicted distribution
    quantiles:np.ndarray=None           # (n_rows, 19), of a predicted distribution
    logits:np.ndarray=None              # (n_rows, 2), of classes


@dataclass
class Fitted:
    "A trained network and the CPU seconds that it took"
    learn:object
    seconds:float


class SkipValidation(Callback):
    "Skip the validation of each epoch"
    order = 1000
    def before_validate(self): raise CancelValidException()


class Networks:
    "Networks for a table and a seed; each is trained once, whichever methods use it"
    def __init__(self, data:Data, seed:int, max_epochs:int=None):
        self.data,self.seed,self.fits = data,seed,{}
        self.epochs = min(data.epochs, max_epochs or data.epochs)
        y = data.parts[0][data.target]
        self.mean,self.sd = (0.,1.) if data.classes else (float(y.mean()),float(y.std()))

    def _dls(self):
        d = self.data
        df = pd.concat(d.parts[:2], ignore_index=True)[[*d.columns, d.target]]
        if not d.classes: df[d.target] = ((df[d.target]-self.mean)/self.sd).astype('float32')
        n = len(d.parts[0])
        procs = [Categorify, FillMissingAnywhere, QuantileNormalize if d.ple else Normalize]
        block = CategoryBlock([0,1]) if d.classes else RegressionBlock()
        to = TabularPandas(df, procs, list(d.cats), list(d.conts), d.target, block, (list(range(n)),list(range(n, len(df)))),
                           reduce_memory=False)
        return tabular_dls(to, d.bs, device='cpu')

    def fit(self, noise=None, cycles=0, member=0, **config) -> Fitted:
        "Return the trained network with these settings"
        key = noise,cycles,member,*sorted(config.items())
        if key in self.fits: return self.fits[key]
        set_seed(self.seed*100+member)
        config = dict(num_embeddings='ple' if self.data.ple else None) | config
        learn = tabular_learner(self._dls(), [200,100], config=tabular_dropconnect_config(**config), noise=noise, wd=1e-2, fast=True)
        start = time.process_time()
        with learn.no_bar(),learn.no_logging():
            learn.add_cb(SkipValidation())
            # 4 cycles of 8 epochs cost less than twice 20 epochs, and score no worse than cycles of 10
            if cycles: learn.fit_zero_restarts(cycles, max(1, 2*self.epochs//5), 1e-2, seed=self.seed)
            else: learn.fit_one_cycle(self.epochs, 1e-2)
            learn.remove_cb(SkipValidation)
        self.fits[key] = Fitted(learn, time.process_time()-start)
        return self.fits[key]

    def dl(self, learn, i):
        return learn.dls.test_dl(self.data.parts[i][self.data.columns].copy(), bs=1024)

    def _scaled(self, mean, **spreads):
        return Prediction(mean*self.sd+self.mean, **{k: None if v is None else v*self.sd for k,v in spreads.items()})

    def predict(self, fitted, i) -> Prediction:
        "Predict with the network, or its members"
        pred,_ = predicted(fitted.learn, self.dl(fitted.learn, i))
        array = lambda t: None if t is None else t.double().numpy().reshape(len(t), -1)
        mean,spread = array(pred.mean),array(pred.spread)
        if self.data.classes:
            return Prediction(mean[:,1], None if spread is None else spread[:,1], logits=array(pred.logits))
        if pred.distribution is None: return self._scaled(mean[:,0], spread=None if spread is None else spread[:,0])
        dist = pred.distribution
        res = self._scaled(mean[:,0], sd=array(dist.sd)[:,0], spread=array(dist.sd_members)[:,0])
        res.quantiles = dist.quantiles(LEVELS)[:,0].double().numpy()*self.sd+self.mean
        return res

    def passes(self, fitted, i, **kwargs) -> Prediction:
        "Predict with noisy passes"
        learn = fitted.learn
        with learn.no_bar():
            if kwargs.get('method')=='moments': mean,var,_ = learn.get_mc_preds(dl=self.dl(learn, i), **kwargs)
            else:
                samples,_ = learn.get_mc_preds(PASSES, dl=self.dl(learn, i), seed=self.seed, **kwargs)
                mean,var = samples.mean(1),samples.var(1)
        mean,sd = mean.double().numpy(),var.double().clamp(min=0).sqrt().numpy()
        if self.data.classes: return Prediction(mean[:,1], sd[:,1], logits=np.log(mean.clip(1e-9)))
        return self._scaled(mean[:,0], spread=sd[:,0])

    def average(self, fits, i) -> Prediction:
        "Predict with several networks"
        preds = [self.predict(f, i) for f in fits]
        mean = np.stack([p.mean for p in preds])
        if not self.data.classes: return Prediction(mean.mean(0), mean.std(0))
        p = mean.mean(0).clip(1e-9, 1-1e-9)
        return Prediction(p, mean.std(0), logits=np.stack([np.log(1-p),np.log(p)], 1))


@dataclass(frozen=True)
class Method:
    "A way to predict with networks"
    fit:dict=field(default_factory=dict)    # Settings of the network
    passes:dict=None                        # Of noisy passes, if there are any
    nets:int=1                              # Networks, with seeds of their own

    def run(self, networks) -> tuple: # Predictions of calibration and test rows, CPU seconds to train and to predict
        fits = [networks.fit(**self.fit, member=k) for k in range(self.nets)]
        start = time.process_time()
        if self.passes is not None: preds = [networks.passes(fits[0], i, **self.passes) for i in (1,2)]
        elif self.nets>1: preds = [networks.average(fits, i) for i in (1,2)]
        else: preds = [networks.predict(fits[0], i) for i in (1,2)]
        return *preds,sum(f.seconds for f in fits),time.process_time()-start


def _dropconnect(mode): return Method(dict(weight_p=P, mode=mode), dict(mode=None))

NETWORKS = {
    'plain': Method(),
    'plain, noise p=.1 when it predicts': Method(passes=dict(p=P)),
    'plain, moments p=.1': Method(passes=dict(p=P, method='moments')),
    'MC dropout .1': Method(dict(ps=P), dict(mode=None)),
    'MC DropConnect gaussian': _dropconnect('gaussian'), 'MC DropConnect example': _dropconnect('example'),
    'MC DropConnect batch': _dropconnect('batch'),
    'MC DropConnect moments': Method(dict(weight_p=P, mode='gaussian'), dict(method='moments')),
    '5 networks': Method(nets=5), 'masked members 8': Method(dict(members=8)), 'zero restarts 4': Method(dict(cycles=4)),
    'gaussian': Method(dict(noise='gaussian')), 'mixture': Method(dict(noise='mixture')), 'quantile': Method(dict(noise='quantile')),
    'quantile, masked members 8': Method(dict(noise='quantile', members=8)),
    'quantile, zero restarts 4': Method(dict(noise='quantile', cycles=4)),
    'mixture, zero restarts 4': Method(dict(noise='mixture', cycles=4))}

def fits_table(
    method:Method,
    data:Data
) -> bool:
    "Does the method make sense for the table?"
    if not data.classes: return True
    moments = (method.passes or {}).get('method')=='moments'       # of logits
    return 'noise' not in method.fit and not moments
