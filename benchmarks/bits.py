"""Statistical tests of the random bits of `fastai_dropconnect.masks`

A weight is dropped if its number of 20 bits is below the threshold. The upper 8 bits are random; the lower 12 come from a fixed list.
The tests also run on three controls: Philox4x32, a weakened copy of our generator that must fail, and a copy whose counters are the same
in every row block.

    python benchmarks/bits.py                         # all tests of all generators, writes results/bits.csv
    python benchmarks/bits.py --quick                 # a hundredth of the samples
    python benchmarks/bits.py --exhaustive 3          # every 2**32 state for 3 random pairs of keys
    python benchmarks/bits.py --differences 1024      # correlation, over all keys, of the masks of pairs of 1024 inputs
    python benchmarks/bits.py --stream ours --order inputs | dieharder -g 200 -d 2     # or all of dieharder.py
"""
import argparse, csv, math, os, sys, time, zlib
from collections import namedtuple
from pathlib import Path
import numpy as np, torch
from numba import njit
from scipy import stats
from fastai_dropconnect import masks

Row = namedtuple('Row', 'generator test detail samples statistic dof p_value')
ps = (.001, .01, .1, .3, .5, .9)
kinds = ('ours', 'philox', 'no_xorshift', 'fixed_counters')
u32,u64 = np.uint32,np.uint64

# ---- generators -------------------------------------------------------------------------------------------------------------

M1,M2,G = u32(0x7feb352d),u32(0x846ca68b),u32(0x9e3779b9)      # of the hash `masks._mix`
S0,S1,S2,S3 = u32(0x85ebca6b),u32(0xc2b2ae35),u32(0x27d4eb2f),u32(0x165667b1)
W1,W2 = u32(0x2c1b3c6d),u32(0xdba3322d)
P0,P1,Q0,Q1 = u64(0xD2511F53),u64(0xCD9E8D57),u32(0x9E3779B9),u32(0xBB67AE85)
low = u64(0xffffffff)

@njit(inline='always')
def mul(a, b): return u32(u64(a)*u64(b) & low)

@njit(inline='always')
def add(a, b): return u32(u64(a)+u64(b) & low)

@njit(inline='always')
def shr(x, k): return u32(x ^ (x >> u32(k)))

@njit(inline='always')
def mix(x): return shr(mul(shr(mul(shr(x, 16), M1), 15), M2), 16)

@njit(inline='always')
def key(seed, b, o, salt):
    "Compute what `masks._hash_numbers` computes for one block and one number"
    k = mix(add(mix(u32(seed & low) ^ salt), u32(seed >> u64(32))))
    return mix(mix(add(k, mul(u32(b), G))) ^ mul(u32(o), G))

@njit(inline='always')
def philox(seed, c0, c1, c2, c3):
    "Philox4x32-10 of Salmon et al. (2011)"
    k0,k1 = u32(seed & low),u32(seed >> u64(32))
    for _ in range(10):
        h0,h1 = P0*u64(c0),P1*u64(c2)
        c0,c1,c2,c3 = (u32(u32(h1 >> u64(32)) ^ c1 ^ k0), u32(h1 & low),
                       u32(u32(h0 >> u64(32)) ^ c3 ^ k1), u32(h0 & low))
        k0,k1 = add(k0, Q0),add(k1, Q1)
    return c0,c1,c2,c3

ranks_of_limits = masks._limit_ranks.astype(np.uint32)

@njit(nogil=True, cache=True)
def fill_counters(kind, seed, b, res):
    "Write the counters of all inputs to `res`"
    for i in range(len(res)): res[i] = mix(mul(u32(i+1), G)) if kind==3 else key(seed, b, i, S3)

@njit(nogil=True, cache=True)
def fill(kind, ranks, seeds, b0, o0, i0, res):
    "Write the 20-bit numbers to `res`, of shape `(seeds, blocks, 8, outputs, inputs)`"
    S,B,_,O,I = res.shape
    t = np.empty((i0+I+15)//16*16, np.uint32)
    for s in range(S):
        seed = u64(seeds[s])
        for b in range(B):
            fill_counters(kind, seed, b0+b, t)
            for o in range(O):
                if kind==1:
                    for i in range(I):
                        for half in range(2):
                            w = philox(seed, u32(b0+b), u32(o0+o), u32(i0+i), u32(half))
                            for j in range(4): res[s,b,4*half+j,o,i] = w[j] >> u32(12)
                    continue
                k0,k1,k2 = key(seed, b0+b, o0+o, S0),key(seed, b0+b, o0+o, S1),key(seed, b0+b, o0+o, S2)
                for c in range(i0//16*16, len(t)):
                    x = add(k0, t[c])
                    if kind!=2: x = shr(x, 15)
                    y,z = add(mul(x, W1), k1),add(mul(x, W2), k2)
                    if kind!=2: y,z = shr(y, 16),shr(z, 16)
                    first,j = c//16*16,c%16//4
                    for byte in range(4):
                        within = c%4*4+byte
                        i = first+within-i0
                        if i<0 or i>=I: continue
                        place = 16*j+within+int(t[first] >> u32(20))
                        low1,low2 = ranks[(place+int(k1 >> u32(20)))&4095],ranks[(place+int(k2 >> u32(20)))&4095]
                        res[s,b,j,o,i] = u32((y >> u32(8*byte) & u32(255)) << u32(12) | low1)
                        res[s,b,j+4,o,i] = u32((z >> u32(8*byte) & u32(255)) << u32(12) | low2)

def counters(kind, n, b=0, seed=1):
    "Return the counters of the first `n` inputs in row block `b`"
    res = np.empty(n, np.uint32)
    fill_counters(kinds.index(kind), u64(seed), b, res)
    return res

def make(kind, seeds, B, O, I, b0=0, o0=0, i0=0):
    "Make 20-bit numbers of shape `(seeds, blocks, 8, outputs, inputs)`"
    res = np.empty((len(seeds), B, 8, O, I), np.uint32)
    fill(kinds.index(kind), ranks_of_limits, np.asarray(seeds, np.int64).view(np.uint64), b0, o0, i0, res)
    return res

def deciding(u):
    "Return the upper 8 bits of numbers"
    return (u >> u32(12)).astype(np.uint8)

def check_twins():
    "Raise unless `make` and `dropped` give the masks of `masks.mask_bits`, and Philox its published numbers"
    for seed in (0, -1, 2**62+12345, -2**63):
        keys,t = masks.mask_keys(torch.tensor(seed), range(3, 8), 7),masks.mask_counters(torch.tensor(seed), range(3, 8), 33)
        got = make('ours', [seed], 5, 7, 33, b0=3)[0]
        for p in (0, *ps, .997):
            kept = masks.mask_bits(keys, t, masks.drop_threshold(p)).numpy()[...,:33]
            if not np.array_equal(kept, ~dropped(got, p).reshape(40, 7, 33)): raise AssertionError(f'masks differ: {seed=}, {p=}')
        if not np.array_equal(make('ours', [seed], 2, 3, 15, b0=4, o0=2, i0=9)[0], got[1:3,:,2:5,9:24]): raise AssertionError('a part differs')
    zero = [f'{w:05x}' for w in make('philox', [0], 1, 1, 1).ravel()[:4]]
    if zero!=['6627e', 'e169c', 'bc57a', '9b00d']: raise AssertionError(f'Philox4x32-10 of zeros is wrong: {zero}')

def dropped(u, p): return u < masks.drop_threshold(p)
edges = np.array([masks.drop_threshold(p) for p in ps], np.uint32)
classes = np.searchsorted(edges, np.arange(2**20, dtype=np.uint32), side='right').astype(np.uint8)
q = np.diff(np.r_[0, edges.astype(float), 2**20])/2**20       # probabilities of the classes
thresholds = tuple(masks.drop_probability(int(e)) for e in edges)

# ---- tools ------------------------------------------------------------------------------------------------------------------

def chi2(counts, probs):
    "Return statistic, degrees of freedom and p; cells with an expected count below 10 are pooled"
    counts,probs = np.asarray(counts, float).ravel(),np.asarray(probs, float).ravel()
    want = probs*counts.sum()
    few = want<10
    if few.any(): counts,want = np.r_[counts[~few], counts[few].sum()],np.r_[want[~few], want[few].sum()]
    if want[-1]<5: counts,want = np.r_[counts[:-2], counts[-2:].sum()],np.r_[want[:-2], want[-2:].sum()]
    x,dof = ((counts-want)**2/want).sum(),len(want)-1
    return x,dof,stats.chi2.sf(x, dof)

@njit(nogil=True, cache=True)
def _count2(a, b, res):
    for i in range(len(a)): res[a[i],b[i]] += 1
@njit(nogil=True, cache=True)
def _count3(a, b, c, res):
    for i in range(len(a)): res[a[i],b[i],c[i]] += 1
@njit(nogil=True, cache=True)
def _count4(a, b, c, d, res):
    for i in range(len(a)): res[a[i],b[i],c[i],d[i]] += 1
_counts = {2:_count2, 3:_count3, 4:_count4}

def table(parts, res):
    "Add the joint classes of `parts` (arrays of one shape) to `res`"
    _counts[len(parts)](*[np.ascontiguousarray(a).ravel() for a in parts], res)

def judge(kind, test, detail, res):
    "Test a table of joint classes: all cells, and for each p the parity of 'dropped'"
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

def split(x, axis, lag, k=2):
    "Return `k` views of `x` whose equal positions are `lag` apart along `axis`, without using an element twice"
    n = x.shape[axis]//(k*lag)
    x = x.take(range(n*k*lag), axis) if n*k*lag<x.shape[axis] else x
    x = x.reshape(*x.shape[:axis], n, k, lag, *x.shape[axis+1:])
    return [x[(slice(None),)*(axis+1)+(j,)] for j in range(k)]

def square(x, a, b):
    "Return the four corners of rectangles; `a` and `b` are (axis, lag)"
    return [v for u in split(x, *a) for v in split(u, b[0]+(b[0]>a[0]), b[1])]

# ---- tests ------------------------------------------------------------------------------------------------------------------

ROW,OUT,IN = 1,2,3       # axes of a chunk of one seed: (row of a block, block, output, input) is (0, 1, 2, 3)
rng_of = lambda kind, name: np.random.default_rng(zlib.crc32(name.encode()))    # the same seeds for each generator
def draw(rng, n): return rng.integers(-2**63, 2**63, n)

def joint(kind, total):
    "Test the joint distribution of two, three and four numbers"
    tests,rng = {},rng_of(kind, 'joint')
    def count(test, detail, parts):
        if (test,detail) not in tests: tests[test,detail] = np.zeros((len(q),)*len(parts), np.int64)
        table(parts, tests[test,detail])
    B,O,I = 64,64,512
    for _ in range(max(1, round(total/(8*B*O*I)))):
        x = np.ascontiguousarray(classes[make(kind, draw(rng, 1), B, O, I)[0]].swapaxes(0, 1))
        for name,axis,n in ('block',ROW,B),('output',OUT,O),('input',IN,I):
            for lag in [2**k for k in range(10) if 2**(k+1)<=n] + [3,7]: count('pair', f'{name} lag {lag}', split(x, axis, lag))
        a,b = split(x, ROW, 1)
        for j in range(8):
            for k in range(j): count('pair', f'rows {k},{j} of a block', [x[k], x[j]])
            for k in (j+1)%8,(j+4)%8: count('pair', f'row {j} and row {k} of the next block', [a[j], b[k]])
            count('triple', f'rows {j},{(j+1)%8},{(j+4)%8} of a block', [x[k%8] for k in (j,j+1,j+4)])
            a_in,b_in = split(x[j], IN-1, 1)
            count('pair', f'rows {j},{(j+1)%8} of a block, input lag 1', [a_in, split(x[(j+1)%8], IN-1, 1)[1]])
        for four in (0,1,2,3),(4,5,6,7),(0,1,4,5),(2,3,6,7): count('quadruple', f'rows {four} of a block', [x[k] for k in four])
        for lag in 1,16,128:
            count('quadruple', f'inputs, lag {lag}', split(x, IN, lag, 4))
            for j,k in (0,1),(0,4),(3,7),(5,6): count('rectangle', f'rows {j},{k} x inputs lag {lag}', split(x[j], IN-1, lag)+split(x[k], IN-1, lag))
        for a,b in ((OUT,1),(IN,1)), ((OUT,1),(IN,256)), ((OUT,32),(IN,1)), ((OUT,4),(IN,4)), ((ROW,1),(IN,1)), ((ROW,1),(OUT,1)), ((ROW,16),(IN,16)), ((ROW,16),(OUT,16)):
            count('rectangle', ' x '.join(f'{("","blocks","outputs","inputs")[c]} lag {l}' for c,l in (a,b)), square(x, a, b))
    return [r for (test,detail),res in tests.items() for r in judge(kind, test, detail, res)]

def seeds(kind, total):
    "Test pairs of similar seeds, and rectangles of such pairs with neighbors along other axes"
    rng,rows,S = rng_of(kind, 'seeds'),[],256
    bits = lambda k: np.array(1, np.uint64) << np.uint64(k)
    near = {'s, s+1': lambda s: s+1, 's, s+2**16': lambda s: s+2**16, 's, s+2**32': lambda s: s+2**32, 's, -s': lambda s: -s,
            's, halves swapped': lambda s: (s.view(np.uint64) >> u64(32) | s.view(np.uint64) << u64(32)).view(np.int64)}
    near |= {f's, s^2**{k}': lambda s,k=k: (s.view(np.uint64) ^ bits(k)).view(np.int64) for k in (0,1,15,31,32,33,47,63)}
    for start in 'random','small':
        for name,other in near.items():
            res,quad = np.zeros((len(q),)*2, np.int64),np.zeros((len(q),)*4, np.int64)
            for c in range(max(1, round(total/(8*2*16*64*S)))):
                s = draw(rng, S) if start=='random' else np.arange(S, dtype=np.int64)*2+2*S*c+1
                a,b = (classes[make(kind, v, 2, 16, 64)] for v in (s, other(s)))
                table([a,b], res)
                table(split(a, 4, 1)+split(b, 4, 1), quad)
            rows += judge(kind, 'seed pair', f'{start} seeds {name}', res)+judge(kind, 'seed rectangle', f'{start} seeds {name} x inputs lag 1', quad)
    return rows

def singles(kind, total):
    "Test the 65536 values of upper 16 bits, and how often each position is dropped over many seeds"
    rng,rows,S = rng_of(kind, 'singles'),[],1024
    values,counts,n = np.zeros((8, 2**16)),{(w,p): 0 for w in ('random','successive') for p in ps},0
    for c in range(max(1, round(total/(8*4*8*32*S*2)))):
        for which,s in ('random', draw(rng, S)),('successive', np.arange(S)+c*S):
            u = make(kind, s, 4, 8, 32)
            if which=='random':
                for j in range(8): values[j] += np.bincount(u[:,:,j].ravel() >> u32(4), minlength=2**16)
            for p in ps: counts[which,p] = counts[which,p] + dropped(u, p).sum(0)
        n += S
    for j in range(8): rows.append(Row(kind, 'single', f'values of row {j}', int(values[j].sum()), *chi2(values[j], np.full(2**16, 2.**-16))))
    for (which,p),k in counts.items():
        t = masks.drop_probability(masks.drop_threshold(p))
        x = ((k-n*t)**2/(n*t*(1-t))).sum()
        rows.append(Row(kind, 'single', f'positions over {which} seeds p={p}', n*k.size, x, k.size, stats.chi2.sf(x, k.size)))
    return rows

def avalanche(kind, total):
    "Test which of the 8 bits of a number that are random flip when a bit of the seed flips"
    rng,S = rng_of(kind, 'avalanche'),128
    reps = max(1, round(total/(64*8*2*8*32*S*2)))
    flips,weight = np.zeros((64, 8)),np.zeros(9)
    ones = np.array([bin(v).count('1') for v in range(2**8)], np.uint8)
    for k in range(64):
        for _ in range(reps):
            s = draw(rng, S)
            flipped = (s.view(np.uint64) ^ (u64(1) << u64(k))).view(np.int64)
            d = deciding(make(kind, s, 2, 8, 32)) ^ deciding(make(kind, flipped, 2, 8, 32))
            for j in range(8): flips[k,j] += (d >> np.uint8(j) & np.uint8(1)).sum()
            weight += np.bincount(ones[d].ravel(), minlength=9)
    n = weight.sum()/64
    z2 = (flips-n/2)**2/(n/4)
    return [Row(kind, 'avalanche', 'bits that flip', int(n*64), z2.sum(), z2.size, stats.chi2.sf(z2.sum(), z2.size)),
            Row(kind, 'avalanche', 'number of bits that flip', int(n*64), *chi2(weight, stats.binom.pmf(range(9), 8, .5)))]

def sums(kind, total):
    "Test the number of dropped weights along an axis against the binomial distribution"
    B,O,I = 64,256,256
    rng,hist = rng_of(kind, 'sums'),{}
    for _ in range(max(1, round(total/(8*B*O*I)))):
        u = make(kind, draw(rng, 1), B, O, I)[0]
        for p in ps:
            d = u<masks.drop_threshold(p)
            for name,axes in ('inputs',3),('outputs',2),('blocks',0),('rows of a block',1),('rows',(0,1)):
                k = d.sum(axes, dtype=np.int32)
                n = d.size//k.size
                hist[name,p,n] = hist.get((name,p,n), 0)+np.bincount(k.ravel(), minlength=n+1)
    return [Row(kind, 'sum', f'over {n} {name} p={p}', int(h.sum()), *chi2(h, stats.binom.pmf(range(n+1), n, masks.drop_probability(masks.drop_threshold(p)))))
            for (name,p,n),h in hist.items()]

@njit(nogil=True, cache=True)
def ranks(m, res):
    "Count the ranks over GF(2) of 32x32 matrices, given as 32 words each"
    for k in range(len(m)):
        r = 0
        for bit in range(32):
            for i in range(r, 32):
                if m[k,i] >> u32(bit) & u32(1):
                    m[k,i],m[k,r] = m[k,r],m[k,i]
                    for l in range(r+1, 32):
                        if m[k,l] >> u32(bit) & u32(1): m[k,l] ^= m[k,r]
                    r += 1
                    break
        res[r] += 1

def rank_probabilities(n=32):
    res = np.zeros(n+1)
    for r in range(n+1):
        res[r] = 2.**(r*(2*n-r)-n*n)*math.prod((1-2.**(i-n))**2/(1-2.**(i-r)) for i in range(r))
    return res

def rank(kind, total):
    "Test the ranks of 32x32 matrices of masks at p=0.5"
    B,O,I = 16,32,1024
    rng,hist = rng_of(kind, 'rank'),{}
    for _ in range(max(1, round(total/(8*B*O*I)))):
        d = dropped(make(kind, draw(rng, 1), B, O, I)[0], .5).reshape(B*8, O, I)
        for name,axes in ('rows x inputs',(1,0,2)),('outputs x inputs',(0,1,2)),('rows x outputs',(2,0,1)),('inputs x rows of one output',(1,2,0)):
            t = d.transpose(axes)
            t = t.reshape(-1, t.shape[1]//32, 32, t.shape[2]//32, 32).swapaxes(2, 3)
            words = np.packbits(np.ascontiguousarray(t).reshape(-1, 32), axis=1).view(np.uint32).reshape(-1, 32)
            ranks(words, hist.setdefault(name, np.zeros(33, np.int64)))
    return [Row(kind, 'rank', f'32x32 {name}', int(h.sum()), *chi2(h, rank_probabilities())) for name,h in hist.items()]

def spectrum(kind, total):
    "Test the mean power of each frequency along each axis, and the distribution of power in long streams"
    B,O,I = 32,256,256
    rng,power,long,n_seq = rng_of(kind, 'spectrum'),{},[],{}
    for _ in range(max(1, round(total/(8*B*O*I)))):
        x = np.where(dropped(make(kind, draw(rng, 1), B, O, I)[0], .5), np.float32(1), np.float32(-1)).reshape(8*B, O, I)
        for axis,name in enumerate(('rows','outputs','inputs')):
            y = np.moveaxis(x[:64] if axis else x[:,:64], axis, -1)
            f = np.abs(torch.fft.rfft(torch.from_numpy(np.ascontiguousarray(y))).numpy()[...,1:-1])**2/y.shape[-1]
            power[name],n_seq[name] = power.get(name, 0)+f.sum((0,1), dtype=float),n_seq.get(name, 0)+f.shape[0]*f.shape[1]
            long.append((name, np.abs(torch.fft.rfft(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, axis, -1)).ravel()[:2**22])).numpy()[1:-1])**2/2**22))
    rows = []
    for name,f in power.items():
        n = n_seq[name]
        z2 = (f/n-1)**2*n/(1-1/256)
        rows.append(Row(kind, 'spectrum', f'along {name}', n*256, z2.sum(), len(z2), stats.chi2.sf(z2.sum(), len(z2))))
        v = np.concatenate([g for m,g in long if m==name])
        h = np.bincount(np.minimum((-np.expm1(-v)*256).astype(int), 255), minlength=256)
        rows.append(Row(kind, 'spectrum', f'stream, {name} fastest', 2*len(v), *chi2(h, np.full(256, 1/256))))
        rows.append(Row(kind, 'spectrum', f'highest peak, {name} fastest', 2*len(v), v.max(), 1, -math.expm1(-len(v)*math.exp(-v.max()))))
    return rows

def runs(kind, total):
    "Test the lengths of runs of dropped and of kept weights"
    B,O,I = 64,64,512
    rng,hist = rng_of(kind, 'runs'),{}
    for _ in range(max(1, round(total/(8*B*O*I)))):
        u = make(kind, draw(rng, 1), B, O, I)[0]
        for name,axes in ('inputs',(0,1,2,3)),('outputs',(0,1,3,2)),('rows',(2,3,0,1)):
            v = np.ascontiguousarray(u.transpose(axes)).ravel()
            for p in ps:
                d = v<masks.drop_threshold(p)
                ends = np.flatnonzero(d[1:]!=d[:-1])
                for what in (True,False):
                    n = np.minimum(np.diff(ends)[d[ends[1:]]==what], 2000)
                    key_ = name,p,what
                    hist[key_] = hist.get(key_, 0)+np.bincount(n, minlength=2001)[1:]
    rows = []
    for (name,p,what),h in hist.items():
        t = masks.drop_probability(masks.drop_threshold(p))
        t = t if what else 1-t
        probs = t**np.arange(2000)*(1-t)
        probs[-1] = t**1999
        rows.append(Row(kind, 'runs', f'of {"dropped" if what else "kept"} along {name} p={p}', int(h.sum()), *chi2(h, probs)))
    return rows

def correlated(kind, detail, n_samples, sums):
    "Test the correlations of all pairs, and the largest of them; `sums` holds sums of products of -1 and 1"
    z = (sums[np.triu_indices(len(sums), 1)] if (sums==sums.T).all() else sums.ravel())/math.sqrt(n_samples)
    worst = np.abs(z).max()
    return [Row(kind, 'all pairs', f'{detail}, sum of squares', n_samples, (z**2).sum(), len(z), stats.chi2.sf((z**2).sum(), len(z))),
            Row(kind, 'all pairs', f'{detail}, largest', n_samples, worst, 1, -math.expm1(len(z)*math.log1p(-min(.999999, 2*stats.norm.sf(worst)))))]

def signs(u): return torch.from_numpy(np.where(dropped(u, .5), np.float32(1), np.float32(-1)))

def input_pairs(kind, total, n=1024, like=((0,0), (3,3), (4,4), (7,7), (0,1), (0,4), (2,6), (1,7))):
    "Test the correlation of each pair of `n` inputs at p=0.5, in the pairs of rows of a block in `like`"
    rng,N = rng_of(kind, f'{n} inputs'),max(1, min(2**7, round(total/(8*n))//1024))*1024
    res = torch.zeros(len(like), n, n)       # whole numbers: exact
    for _ in range(N//1024):
        u = make(kind, draw(rng, 16), 1, 64, n)[:,0]
        d = {j: signs(u[:,j]).reshape(1024, n) for j in set(sum(like, ()))}
        for c,(j,k) in zip(res, like): c.addmm_(d[j].T, d[k])
    return [r for (j,k),c in zip(like, res) for r in correlated(kind, f'{n} inputs, rows {j},{k}', N, c.double().numpy())]

def output_pairs(kind, total, n=512):
    "Test the correlation of each pair of `n` outputs at p=0.5"
    rng,N,res = rng_of(kind, f'{n} outputs'),max(1, min(2**4, round(total/(64*n))//1024))*1024,torch.zeros(n, n)
    for _ in range(N//1024):
        d = signs(make(kind, draw(rng, 1), 2, n, 64)[0]).permute(0, 1, 3, 2).reshape(1024, n)
        res.addmm_(d.T, d)
    return correlated(kind, f'{n} outputs', N, res.double().numpy())

def all_pairs(kind, total):
    "Test pairs of inputs, pairs of many more inputs in two rows of a block, and pairs of outputs"
    return input_pairs(kind, total) + input_pairs(kind, total, 4096, ((0,0), (5,5))) + output_pairs(kind, total)

tests = dict(single=singles, joint=joint, seeds=seeds, avalanche=avalanche, sums=sums, rank=rank, spectrum=spectrum, runs=runs, all_pairs=all_pairs)
sizes = dict(single=2e8, joint=4e8, seeds=1e7, avalanche=1e8, sums=1e8, rank=1e8, spectrum=1e8, runs=1e8, all_pairs=2.2e9)    # numbers

# ---- the stream, for batteries that read standard input ---------------------------------------------------------------------

orders = dict(inputs=((1,16,64,256), (0,1,2,3,4)), outputs=((1,16,256,64), (0,1,2,4,3)),     # shape; axes, the fastest last
              rows=((1,256,32,32), (0,3,4,1,2)), seeds=((256,2,16,32), (1,2,3,4,0)))

def stream(kind, order, first=1, n_bytes=math.inf):
    "Write the upper 8 bits of the numbers to standard output, with increasing seeds"
    (S,B,O,I),axes = orders[order]
    while n_bytes>0:
        chunk = np.ascontiguousarray(deciding(make(kind, first+np.arange(S), B, O, I)).transpose(axes))
        try: sys.stdout.buffer.write(chunk.data)
        except BrokenPipeError: os._exit(0)
        first,n_bytes = first+S,n_bytes-chunk.nbytes

# ---- exact results ----------------------------------------------------------------------------------------------------------

byte_limits = np.array([26, 128, 230], np.uint8)     # p = 0.1, 0.5, 0.9

@njit(nogil=True, cache=True)
def _exhaustive(k1, k2, cls, res):
    for n in range(2**32):
        x = u32(n)
        y,z,at = shr(add(mul(x, W1), k1), 16),shr(add(mul(x, W2), k2), 16),0
        for byte in range(4): at = at*4 + cls[y >> u32(8*byte) & u32(255)]
        for byte in range(4): at = at*4 + cls[z >> u32(8*byte) & u32(255)]
        res[at] += 1

def exhaustive(kind, cases):
    "Print exact results over all 2**32 states for random pairs of keys"
    if kind!='ours': return
    rng,cls = np.random.default_rng(3),np.searchsorted(byte_limits, np.arange(256), side='right').astype(np.uint8)
    probs = np.bincount(cls)/256
    want = np.array([2.**32])
    for _ in range(8): want = np.multiply.outer(want, probs).ravel()
    print(f'{"k1":>8} {"k2":>8} {"chi2/N":>9} ' + ' '.join(f'{f"{v}/256":>9}' for v in byte_limits) + '   largest |correlation| of two bytes;  marginals exact')
    for _ in range(cases):
        k1,k2 = rng.integers(0, 2**32, 2, dtype=np.uint32)
        res = np.zeros(4**8, np.int64)
        _exhaustive(k1, k2, cls, res)
        worst,exact = [],True
        for j,v in enumerate(byte_limits):
            t,c = v/256,res.reshape((4,)*8)
            for axis in range(8): c = np.stack([c.take(range(j+1), axis).sum(axis), c.take(range(j+1, 4), axis).sum(axis)], axis)
            pairs = [c.sum(tuple(k for k in range(8) if k not in (a,b)))[0,0]/2**32 for a in range(8) for b in range(a)]
            worst.append(max(abs(o-t*t)/(t*(1-t)) for o in pairs))
            exact &= all(c.sum(tuple(k for k in range(8) if k!=a))[0]==int(v)*2**24 for a in range(8))
        print(f'{k1:08x} {k2:08x} {((res-want)**2/want).sum()/2**32:9.1e} ' + ' '.join(f'{w:9.1e}' for w in worst), '  ', exact, flush=True)

@njit(nogil=True, cache=True)
def _overlap(ds, K, start, L, M, res):
    "Compute how often two weights whose counters differ by `d` are both dropped by their last bytes, over `K` states and all second keys"
    one = 4294967296.
    for n in range(len(ds)):
        d,total,s = ds[n],0.,u32(start)
        for _ in range(K):
            s = add(s, G)
            k0 = mix(s)
            a,b = mul(shr(k0, 15), M),mul(shr(add(k0, d), 15), M)
            c = float(u32((u64(b)+(u64(1) << u64(32))-u64(a)) & low))
            total += max(0., L-c)+max(0., L-(one-c))
        res[n] = total/K/one

def correlations(ds, M, K, p=.5, start=9):
    "Correlation of the masks of two inputs in a row, over all keys, for each difference in `ds`; its error is about .6/sqrt(K) at p=0.5"
    t,res = masks.drop_probability(masks.drop_threshold(p)),np.empty(len(ds))
    _overlap(np.ascontiguousarray(ds, np.uint32), K, start, t*2**32, M, res)
    return (res-t*t)/(t*(1-t))

def worst(ds, M, steps=((2**10, 50000), (2**14, 100), (2**20, 4))):
    "Find the differences with the largest correlation, in steps with more and more states"
    for K,n in steps:
        c = correlations(ds, M, K, start=K)
        best = np.argsort(-abs(c))[:n]
        ds,c = ds[best],c[best]
    return ds,c

def pairs(kind, n, at_least=0):
    "Return counter differences that end in `at_least` zero bits, with their two counters: shape `(3, n_pairs)`"
    t,res = counters(kind, n),[]
    for i in range(n-1):
        d = t[i+1:] - t[i]
        j = np.flatnonzero(d & u32(2**at_least-1)==0)
        res.append(np.stack([d[j], np.full(len(j), i), i+1+j]).astype(np.uint32))
    return np.concatenate(res, 1)

def weak_pairs(kind, n=2048, blocks=16, at_least=10):
    "Correlations at p=0.5, in each word and over many row blocks, of the pairs that are weak in the first: shape `(2, n_pairs)`"
    _,i,j = pairs(kind, n, at_least)
    res = np.zeros((2, len(i)))
    for b in range(blocks):
        t = counters(kind, n, b)
        for row,M in zip(res, (W1,W2)): row += correlations(t[j]-t[i], M, 2**13, start=b+1)/blocks
    return res

def differences(kind, n):
    "Print the largest correlations of weak pairs of `n` counters, and of all differences by their zero bits at the end"
    found = np.abs(weak_pairs(kind, n))
    print(f'{kind}: {found.shape[1]} of {n*(n-1)//2} pairs of counters differ by a number with 10 zero bits at the end')
    print(f'largest |correlation| of their masks at p=0.5 over 16 row blocks: {found.max(initial=0):.4f}; {(found>.02).sum()} above 0.02')
    print('zero bits at the end of d, largest correlation over all such d within a row block')
    for k in range(31, 13, -1):
        ds = ((np.arange(2**(31-k), dtype=np.uint64)*2+1) << u64(k)).astype(np.uint32)
        print(f'{k:>3} ' + ' '.join(f'{abs(worst(ds, M)[1][0]):.4f}' for M in (W1,W2)), flush=True)

# ---- the report -------------------------------------------------------------------------------------------------------------

def summary(rows):
    "Print the number of tests and the smallest p for each generator and kind of test"
    print(f'{"generator":>13} {"test":>10} {"number":>6} {"smallest p":>10} {"p<1e-3":>6} {"fails":>6}  where')
    for kind in dict.fromkeys(r.generator for r in rows):
        mine = [r for r in rows if r.generator==kind]
        for test in dict.fromkeys(r.test for r in mine):
            g = [r for r in mine if r.test==test]
            w = min(g, key=lambda r: r.p_value)
            print(f'{kind:>13} {test:>10} {len(g):6} {w.p_value:10.1e} {sum(r.p_value<1e-3 for r in g):6} {sum(r.p_value<limit(rows) for r in g):6}  {w.detail}')
        p = np.array([r.p_value for r in mine])
        print(f'{kind:>13} {"all":>10} {len(p):6} {p.min():10.1e} {(p<1e-3).sum():6} {(p<limit(rows)).sum():6}')

def limit(rows):
    "Return the p below which a test fails: at most one false alarm in a thousand runs of all tests"
    return 1e-3/max(1, max(sum(r.generator==k for r in rows) for k in kinds))

def battery(kind, scale=1., only=tests):
    "Run the tests of one generator"
    rows = []
    for name in only:
        start = time.time()
        rows += tests[name](kind, sizes[name]*scale)
        print(f'{kind} {name}: {time.time()-start:.0f} s', file=sys.stderr, flush=True)
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--generators', nargs='+', choices=kinds, default=kinds)
    p.add_argument('--tests', nargs='+', choices=list(tests), default=list(tests))
    p.add_argument('--scale', type=float, default=1, help='factor on the number of samples')
    p.add_argument('--quick', action='store_true', help='the same as --scale 0.01')
    p.add_argument('--out', default=Path(__file__).parent/'results'/'bits.csv', help='CSV file; rows of other generators and tests stay in it')
    p.add_argument('--exhaustive', type=int, metavar='CASES')
    p.add_argument('--differences', type=int, metavar='INPUTS')
    p.add_argument('--stream', choices=kinds)
    p.add_argument('--order', choices=list(orders), default='inputs')
    a = p.parse_args()
    check_twins()
    if a.stream: return stream(a.stream, a.order)
    if a.exhaustive:
        for kind in a.generators: exhaustive(kind, a.exhaustive)
        return
    if a.differences:
        for kind in a.generators: differences(kind, a.differences)
        return
    old = list(map(lambda r: Row(*r[:3], int(r[3]), float(r[4]), int(r[5]), float(r[6])), list(csv.reader(open(a.out)))[1:])) if os.path.exists(a.out) else []
    rows = []
    for kind in a.generators:
        rows += battery(kind, .01 if a.quick else a.scale, a.tests)
        redone = {(r.generator,r.test) for r in rows}
        both = sorted([r for r in old if r[:2] not in redone and r.generator in kinds]+rows, key=lambda r: kinds.index(r.generator))
        with open(a.out, 'w', newline='') as f:
            w = csv.writer(f, lineterminator='\n')
            w.writerow(Row._fields)
            w.writerows([*r[:4], f'{r.statistic:.6g}', r.dof, f'{r.p_value:.4g}'] for r in both)
    summary(both)

if __name__=='__main__': main()
