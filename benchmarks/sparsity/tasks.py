"The networks to make small, and their data; the test rows are looked at once, by `Task.test`"
import gzip
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent.parent
MNIST = ROOT.parent/'shared'/'data'/'mnist'
N_VALID = 10_000        # the last training images choose settings


class Missing(Exception): "The data of a task are not here"


class Batches:
    "Random batches of tensors; the last rows that do not fill a batch are left out of an epoch"
    def __init__(self, tensors, bs, shuffle=True):
        self.tensors,self.bs,self.shuffle = tensors,bs,shuffle
        self.dataset = tensors[0]
    def __len__(self): return max(len(self.dataset)//self.bs, 1) if self.shuffle else -(-len(self.dataset)//self.bs)
    def __iter__(self):
        n = len(self.dataset)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for i in range(len(self)):
            rows = order[i*self.bs:(i+1)*self.bs]
            yield tuple(t[rows] for t in self.tensors)
    def to(self, *args): return self


@dataclass
class Task:
    "Rows, a network, a loss and an error"
    name:str
    train:tuple            # inputs and targets
    test:tuple
    model:object           # function that makes a network
    loss:object
    error:object           # function of predictions and targets, lower is better
    metric:str
    epochs:int
    bs:int
    lr:float
    n_in:int=1             # number of inputs among the tensors
    settings:dict=field(default_factory=dict)    # of methods, by their name
    wd:float=1e-4
    decouple_wd:bool=False
    one_cycle:bool=False   # fastai's policy? Otherwise the rate is constant in the first half and then falls to 0

    def batches(self): return Batches(self.train, self.bs)

    def evaluate(self, model, rows) -> float:
        model.eval()
        with torch.no_grad(): outs = torch.cat([model(*batch[:self.n_in]) for batch in Batches(rows, 1000, False)])
        return float(self.error(outs, *rows[self.n_in:]))


@cache
def mnist(folder=MNIST):
    folder = Path(folder)
    def read(name, offset):
        file = folder/f'{name}.gz'
        if not file.exists(): raise Missing(f'{file} is missing: pass --mnist FOLDER with the four idx.gz files of MNIST')
        return np.frombuffer(gzip.open(file).read(), np.uint8, offset=offset).copy()
    def part(name):
        images = torch.tensor(read(f'{name}-images.idx3-ubyte', 16)).view(-1, 784).float()/255
        return images,torch.tensor(read(f'{name}-labels.idx1-ubyte', 8)).long()
    return part('train'),part('t10k')


def parts(train, test, validate): # Training rows and those to evaluate
    if not validate: return train,test
    return [tuple(t[:-N_VALID] for t in train),tuple(t[-N_VALID:] for t in train)]


def percent_wrong(out, y): return 100*(out.argmax(1)!=y).float().mean()
def nmse(out, y): return (out-y).square().sum()/y.square().sum()
def mse(out, y): return (out-y).square().mean()

def relu_net(*sizes):
    layers = [m for a,b in zip(sizes[:-1], sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])

def lenet5():
    net = nn.Sequential(nn.Unflatten(1, (1,28,28)), nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5),
                        nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    return net.to(memory_format=torch.channels_last)    # steps take two thirds of the time

def task_lenet300(options, validate, seed):
    train,test = parts(*mnist(options.mnist), validate)
    return Task('lenet300', train, test, lambda: relu_net(784, 300, 100, 10), F.cross_entropy, percent_wrong, 'error %', 20, 128, 3e-3)

def task_lenet5(options, validate, seed):
    train,test = parts(*mnist(options.mnist), validate)
    return Task('lenet5', train, test, lenet5, F.cross_entropy, percent_wrong, 'error %', 12, 128, 3e-3)

def task_autoencoder(options, validate, seed):
    "DropNeuron's autoencoder; what its authors print as NMSE is the mean squared error of the pixels"
    train,test = parts(*mnist(options.mnist), validate)
    train,test = [(x,x) for x,_ in (train,test)]
    model = lambda: nn.Sequential(*relu_net(784, 128, 64, 128, 784), nn.Sigmoid())
    return Task('autoencoder', train, test, model, F.mse_loss, mse, 'MSE', 20, 128, 3e-3, wd=0.)

def task_regression(options, validate, seed):
    "DropNeuron's example: a linear network, 2 of 20 columns relevant, 100 rows, no noise"
    r = np.random.default_rng(seed + 1000*validate)
    relevant,w = r.choice(20, 2, replace=False),np.zeros(20)
    w[relevant] = r.choice([-1,1], 2)*r.uniform(.5, 2, 2)
    x = [torch.tensor(r.normal(size=(n,20))).float() for n in (100,1000)]
    train,test = [(t, t@torch.tensor(w).float()[:,None]) for t in x]
    model = lambda: nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 1))
    return Task('regression', train, test, model, F.mse_loss, nmse, 'NMSE', 3000, 100, 5e-3, settings=dict(relevant=sorted(relevant.tolist())), wd=0.)

TASKS = dict(regression=task_regression, lenet300=task_lenet300, lenet5=task_lenet5, autoencoder=task_autoencoder)


# Tables: the rows and splits of `benchmarks.accuracy`

LAYERS = dict(bulldozers=[500,250], adult=[200,100], california=[200,100])
BULLDOZERS = ROOT.parent/'shared'/'data'/'bulldozers'/'TrainAndValid.csv'

def table(name, options, validate):
    import pandas as pd
    from fastai.tabular.all import Categorify, RegressionBlock, TabularPandas, get_emb_sz
    from fastai.tabular.model import TabularModel
    from fastai_dropconnect.tabular.procs import FillMissingAnywhere, QuantileNormalize
    from benchmarks.accuracy.tables import Options, development_table, test_rows
    data = Path(options.data or BULLDOZERS)
    if name=='bulldozers' and not data.exists(): raise Missing(f"{data} is missing: pass --data FILE, Kaggle's TrainAndValid.csv")
    try: t = development_table(name, Options(str(data) if name=='bulldozers' else None, options.wheel))
    except ValueError as e: raise Missing(str(e)) from None
    train,test = (t.train,t.valid) if validate else (t.development,test_rows(name, Options(str(data) if name=='bulldozers' else None, options.wheel)))
    df = pd.concat([train, test], ignore_index=True)
    splits = list(range(len(train))),list(range(len(train), len(df)))
    to = TabularPandas(df[[*t.cats,*t.conts,t.target]], [Categorify,FillMissingAnywhere,QuantileNormalize], list(t.cats), list(t.conts),
                       t.target, RegressionBlock(), splits, reduce_memory=False)
    def rows(part):
        return (torch.tensor(part.cats.to_numpy()).long(), torch.tensor(part.conts.to_numpy('float32')),
                torch.tensor(part.ys.to_numpy('float32')).view(-1, 1))
    (c,x,y),held_out = rows(to.train),rows(to.valid)
    mean,sd = (0.,1.) if t.classes else (y.mean(),y.std())
    def auc(out, y):
        from sklearn.metrics import roc_auc_score
        return 1-roc_auc_score(y[:,0], out[:,0])
    def rmse(out, y): return (out*sd+mean-y).square().mean().sqrt()
    sizes,n_cont = get_emb_sz(to),x.shape[1]
    return Task(name, (c,x,(y-mean)/sd), held_out, lambda: TabularModel(sizes, n_cont, 1, LAYERS[name]),
                F.binary_cross_entropy_with_logits if t.classes else F.mse_loss, auc if t.classes else rmse, '1-AUC' if t.classes else 'RMSE',
                10, 256, 5e-3, n_in=2, settings=dict(cat_names=list(to.cat_names), cont_names=list(to.cont_names)), wd=.01,
                decouple_wd=True, one_cycle=True)

TASKS |= {name: (lambda options, validate, seed, name=name: table(name, options, validate)) for name in ('adult','california','bulldozers')}
