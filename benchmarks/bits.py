"""Quality of the random bits of `fastai_dropconnect.masks`: statistical tests of the mask generator, of Philox4x32 as the
control, and of two weakened copies of the generator that the tests must find

    python benchmarks/bits.py                         # all tests of all generators, writes results/bits.csv
    python benchmarks/bits.py --quick                 # a hundredth of the samples
    python benchmarks/bits.py --exhaustive 3          # every 2**32 state for 3 random pairs of keys
    python benchmarks/bits.py --differences 1024      # exact correlation of the masks of each pair of 1024 inputs
    python benchmarks/bits.py --stream ours --order inputs | dieharder -g 200 -a
"""
import argparse, csv, math, os, sys, time, zlib
from collections import namedtuple
from pathlib import Path
import numpy as np, torch
from numba import njit
from scipy import stats
from fastai_dropconnect import masks

Row = namedtuple('Row', 'generator test detail samples statistic dof p_value')
ps = (.01, .1, .3, .5, .9)
kinds = ('ours', 'philox', 'no_xorshift', 'distinct_low')
u32,u64 = np.uint32,np.uint64

# ---- generators -------------------------------------------------------------------------------------------------------------

M1,M2,M3,G = u32(0x7feb352d),u32(0x846ca68b),u32(0x915f77f5),u32(0x9e3779b9)
S0,S1,S2 = u32(0x85ebca6b),u32(0xc2b2ae35),u32(0x27d4eb2f)
P0,P1,W0,W1 = u64(0xD2511F53),u64(0xCD9E8D57),u32(0x9E3779B9),u32(0xBB67AE85)
low = u64(0xffffffff)

@njit(inline='always')
def mul(a, b): return u32(u64(a)*u64(b) & low)

@njit(inline='always')
def add(a, b): return u32(u64(a)+u64(b) & low)

@njit(inline='always')
def shr(x, k): return u32(x ^ (x >> u32(k)))

@njit(inline='always')
def shl16(x): return u32(x ^ u32(u64(x) << u64(16) & low))

@njit(inline='always')
def mix(x): return shr(mul(shr(mul(shr(x, 16), M1), 15), M2), 16)

@njit(inline='always')
def key(seed, b, o, salt):
    "As `masks._key`, of one block and one output"
    k = mix(add(mix(u32(seed & low) ^ salt), u32(seed >> u64(32))))
    return mix(mix(add(k, mul(u32(b), G))) ^ mul(u32(o), G))

@njit(inline='always')
def philox(seed, c0, c1, c2):
    "Philox4x32-10 of Salmon et al. (2011)"
    k0,k1,c3 = u32(seed & low),u32(seed >> u64(32)),u32(0)
    for _ in range(10):
        h0,h1 = P0*u64(c0),P1*u64(c2)
        c0,c1,c2,c3 = (u32(u32(h1 >> u64(32)) ^ c1 ^ k0), u32(h1 & low),
                       u32(u32(h0 >> u64(32)) ^ c3 ^ k1), u32(h0 & low))
        k0,k1 = add(k0, W0),add(k1, W1)
    return c0,c1,c2,c3

@njit(nogil=True)
def fill(kind, t, seeds, b0, o0, i0, res):
    "Write the 16-bit numbers of the lanes to `res`, uint16 of shape `(seeds, blocks, 4, outputs, inputs)`; `t`: counters of the inputs"
    S,B,_,O,I = res.shape
    for s in range(S):
        seed = u64(seeds[s])
        for b in range(B):
            for o in range(O):
                if kind==1:
                    for i in range(I):
                        w = philox(seed, u32(b0+b), u32(o0+o), u32(i0+i))
                        for j in range(4): res[s,b,j,o,i] = w[j] >> u32(16)
                    continue
                k0,k1,k2 = key(seed, b0+b, o0+o, S0),key(seed, b0+b, o0+o, S1),key(seed, b0+b, o0+o, S2)
                for i in range(I):
                    x = mul(k0 ^ t[i], M1)
                    if kind!=2: x = shr(x, 15)
                    y,z = add(mul(x, M2), k1),add(mul(x, M3), k2)
                    res[s,b,0,o,i],res[s,b,1,o,i] = shl16(y) >> u32(16),y >> u32(16)
                    res[s,b,2,o,i],res[s,b,3,o,i] = shl16(z) >> u32(16),z >> u32(16)

def counters(kind, n):
    "Of the first `n` inputs"
    t = masks.mask_counters(n).numpy().view(np.uint32)
    if kind=='distinct_low': t = t & 0xffff0000 | np.arange(1, n+1, dtype=np.uint32) & 0xffff
    return t.astype(np.uint32)

def make(kind, seeds, B, O, I, b0=0, o0=0, i0=0):
    "16-bit numbers, shape `(seeds, blocks, 4, outputs, inputs)`"
    res = np.empty((len(seeds), B, 4, O, I), np.uint16)
    fill(kinds.index(kind), counters(kind, i0+I)[i0:], np.asarray(seeds, np.int64).view(np.uint64), b0, o0, i0, res)
    return res

def check_twins():
    "Raise unless `make` gives the bits of `masks.mask_lanes`, `dropped` those of `masks.mask_bits`, and Philox its published numbers"
    for seed in (0, -1, 2**62+12345, -2**63):
        keys,t = masks.mask_keys(torch.tensor(seed), range(3, 8), 7),masks.mask_counters(33)
        got = make('ours', [seed], 5, 7, 33, b0=3)[0]
        if not np.array_equal(masks.mask_lanes(keys, t).numpy().view(np.uint32) >> 16, got):
            raise AssertionError(f'the generator here differs from masks.mask_lanes: {seed=}')
        for p in ps:
            kept = masks.mask_bits(keys, t, masks.drop_threshold(p)).numpy()!=0
            if not np.array_equal(kept, ~dropped(got, p).reshape(20, 7, 33)): raise AssertionError(f'thresholds differ: {p=}')
    zero = [f'{w:04x}' for w in make('philox', [0], 1, 1, 1).ravel()]
    if zero!=['6627', 'e169', 'bc57', '9b00']: raise AssertionError(f'Philox4x32-10 of zeros is wrong: {zero}')

def order(u):
    "The number that is compared with the threshold: dropped if it is below"
    return np.uint16(0x7fff) - u
def dropped(u, p): return order(u) < masks.drop_threshold(p)
edges = np.array([masks.drop_threshold(p) for p in ps], np.uint16)
classes = np.searchsorted(edges, order(np.arange(2**16, dtype=np.uint16)), side='right').astype(np.uint8)
q = np.diff(np.r_[0, edges.astype(float), 2**16])/2**16       # probabilities of the classes
thresholds = tuple(masks.drop_probability(int(e)) for e in edges)

# ---- tools ------------------------------------------------------------------------------------------------------------------

def chi2(counts, probs):
    "Statistic, degrees of freedom and p; cells that expect fewer than 10 are pooled"
    counts,probs = np.asarray(counts, float).ravel(),np.asarray(probs, float).ravel()
    want = probs*counts.sum()
    few = want<10
    if few.any(): counts,want = np.r_[counts[~few], counts[few].sum()],np.r_[want[~few], want[few].sum()]
    if want[-1]<5: counts,want = np.r_[counts[:-2], counts[-2:].sum()],np.r_[want[:-2], want[-2:].sum()]
    x,dof = ((counts-want)**2/want).sum(),len(want)-1
    return x,dof,stats.chi2.sf(x, dof)

@njit(nogil=True)
def _count2(a, b, res):
    for i in range(len(a)): res[a[i],b[i]] += 1
@njit(nogil=True)
def _count3(a, b, c, res):
    for i in range(len(a)): res[a[i],b[i],c[i]] += 1
@njit(nogil=True)
def _count4(a, b, c, d, res):
    for i in range(len(a)): res[a[i],b[i],c[i],d[i]] += 1
_counts = {2:_count2, 3:_count3, 4:_count4}

def table(parts, res):
    "Add the joint classes of `parts` (arrays of one shape) to `res`"
    _counts[len(parts)](*[np.ascontiguousarray(a).ravel() for a in parts], res)

def judge(kind, test, detail, res):
    "Rows for a table of joint classes: all cells, and for each p the cells of 'dropped' or not and the parity"
    n,k = int(res.sum()),res.ndim
    probs = q
    for _ in range(k-1): probs = np.multiply.outer(probs, q)
    rows = [Row(kind, test, f'{detail}, all classes', n, *chi2(res, probs))]
    for j,p in enumerate(thresholds):
        t = res
        for axis in range(k): t = np.stack([t.take(range(j+1), axis).sum(axis), t.take(range(j+1, len(q)), axis).sum(axis)], axis)
        parity = np.indices(t.shape).sum(0)%2
        odd,want = t[parity==1].sum(),(1-(2*p-1)**k)/2      # an odd number of 'kept'
        z = (odd-n*want)/math.sqrt(n*want*(1-want))
        rows.append(Row(kind, test, f'{detail}, parity p={ps[j]}', n, z, 1, 2*stats.norm.sf(abs(z))))
        if k==2:
            c = (t[0,0]*(1-p)**2+t[1,1]*p*p-(t[0,1]+t[1,0])*p*(1-p))/(p*(1-p))/math.sqrt(n)
            rows.append(Row(kind, test, f'{detail}, correlation p={ps[j]}', n, c, 1, 2*stats.norm.sf(abs(c))))
    return rows

def chunks(kind, total, rng, shape, seeds='random'):
    "Arrays of classes of `shape` (seeds, blocks, outputs, inputs), until `total` numbers were made, each from fresh random seeds"
    S,B,O,I = shape
    for _ in range(max(1, round(total/(4*S*B*O*I)))):
        yield classes[make(kind, rng.integers(-2**63, 2**63, S), B, O, I)]

# ---- the stream, for batteries that read standard input ---------------------------------------------------------------------

orders = dict(inputs=((1,16,64,256), (0,1,2,3,4)), outputs=((1,16,256,64), (0,1,2,4,3)),     # shape; axes, the fastest last
              rows=((1,256,32,32), (0,3,4,1,2)), seeds=((256,2,16,32), (1,2,3,4,0)))

def stream(kind, order, first=1, n_bytes=math.inf):
    "Write the lanes to standard output, two in each 32-bit word; seeds count up"
    (S,B,O,I),axes = orders[order]
    while n_bytes>0:
        chunk = np.ascontiguousarray(make(kind, first+np.arange(S), B, O, I).transpose(axes))
        try: sys.stdout.buffer.write(chunk.data)
        except BrokenPipeError: os._exit(0)
        first,n_bytes = first+S,n_bytes-chunk.nbytes
