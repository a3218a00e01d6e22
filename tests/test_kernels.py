"Kernels under conditions that the contract does not test: threads, forks, missing packages, memory, other processors"
import gc, importlib.util, os, platform, subprocess, sys, threading, time, weakref
import pytest, torch

from fastai_dropconnect.functional import linear_dropconnect
from fastai_dropconnect.kernels import numba as cpu, torch as reference
from fastai_dropconnect.masks import draw_seed


def process(code, *flags, **env):
    "Run `code` in a new Python process"
    res = subprocess.run([sys.executable, *flags, '-c', code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr
    return res


def run(code, **env):
    "What a new Python process prints"
    return process(code, **env).stdout.strip()


def tensors(n=70, n_in=90, n_out=33, dtype=torch.float32):
    "Inputs, a weight, and a gradient of the outputs"
    return [torch.randn(s, dtype=dtype) for s in ((n,n_in), (n_out,n_in), (n,n_out))]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('threshold', [1, 10_000, 2**19, 2**20-1])
@pytest.mark.parametrize('n', range(1, 10))
def test_every_tail_of_a_block(n, threshold, dtype):
    for n_in,n_out in ((1,1), (15,2), (16,3), (33,1), (513,129)):
        (x,w,g),seed,tol = tensors(n, n_in, n_out, dtype),draw_seed(),dict(rtol=1e-4, atol=1e-3 if dtype==torch.float32 else 1e-10)
        torch.testing.assert_close(cpu.forward(x, w, seed, threshold), reference.forward(x, w, seed, threshold), **tol)
        torch.testing.assert_close(cpu.grads(g, x, w, seed, threshold), reference.grads(g, x, w, seed, threshold), **tol)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scale_and_bias_are_those_of_torch(dtype):
    "Bit for bit: half precision is rounded in between, and a bias of another type or shape is added by torch"
    for n_in,n_out in ((16,16), (33,5), (7,40)):
        (x,w,g),seed = tensors(11, n_in, n_out, dtype),draw_seed()
        sums = cpu.forward(x, w, seed, 9000)
        biases = None,torch.randn(n_out, dtype=dtype),torch.randn(n_out, 2, dtype=dtype)[:,0],torch.randn(1, dtype=dtype),torch.randn(n_out).double()
        for scale in (1., 1/.7):
            for b in biases:
                want = sums*scale if b is None else torch.add(b, sums, alpha=scale)
                got = cpu.forward(x, w, seed, 9000, scale, b)
                assert got.dtype==want.dtype and torch.equal(got, want), (n_in, scale, b)
            for a,b in zip(cpu.grads(g, x, w, seed, 9000, scale), cpu.grads(g*scale, x, w, seed, 9000)): assert torch.equal(a, b)
            torch.testing.assert_close(reference.forward(x, w, seed, 9000, scale, biases[1]).float(), cpu.forward(x, w, seed, 9000, scale, biases[1]).float(), rtol=2e-2, atol=1e-1)
            for a,b in zip(reference.grads(g, x, w, seed, 9000, scale), reference.grads(g*scale, x, w, seed, 9000)): assert torch.equal(a, b)


def test_memory_elsewhere_is_never_read():
    "Kernels take addresses, so a tensor on another device or of another type must be refused before"
    (x,w,g),seed = tensors(),draw_seed()
    for calls in (lambda: cpu.forward(x, w.to('meta'), seed, 9000), lambda: cpu.forward(x, w, seed, 9000, 1., torch.zeros(33, device='meta')),
                  lambda: cpu.grads(g, x.to('meta'), w, seed, 9000), lambda: cpu.forward(x, w, seed.to('meta'), 9000)):
        with pytest.raises(RuntimeError, match='all tensors must be on the CPU, got one on meta'): calls()
    for calls in (lambda: cpu.forward(x, w.double(), seed, 9000), lambda: cpu.forward(x.double(), w, seed, 9000), lambda: cpu.grads(g, x, w.double(), seed, 9000),
                  lambda: cpu.grad_weight(g.double(), x, seed, 9000), lambda: cpu.grad_input(g, w.double(), seed, 9000),
                  lambda: linear_dropconnect(x, w, torch.zeros(33).double(), drop_bias=True, backend='numba')):
        with pytest.raises(TypeError, match='all tensors must be of one type, got torch.float'): calls()
    x,w = x.t().contiguous().t(),w[:,::2].repeat_interleave(2, 1)[:,:90]
    torch.testing.assert_close(cpu.forward(x, w, seed, 9000), reference.forward(x, w, seed, 9000), rtol=1e-4, atol=1e-3)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    (x,w,g),seed,res = tensors(300, 700, 150),draw_seed(),[]
    for k in (1, 2, 3, 7):
        monkeypatch.setattr(cpu, 'n_threads_for', lambda work: k)
        res.append((cpu.forward(x, w, seed, 9000), *cpu.grads(g, x, w, seed, 9000), cpu.grad_input(g, w, seed, 9000), cpu.grad_weight(g, x, seed, 9000)))
    for other in res[1:]:
        for a,b in zip(res[0], other): assert torch.equal(a, b)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def fails(first, last):
        if first: raise RuntimeError('in a thread')
    with pytest.raises(RuntimeError, match='in a thread'): cpu.run_in_threads(fails, (), (), 4, 2)


def test_an_interrupt_leaves_other_threads_their_memory():
    "They have only addresses, and still write when the caller has left"
    def interrupted():
        t,go,done = torch.zeros(1),threading.Event(),threading.Event()
        def kernel(address, first, last):
            if first==0: raise KeyboardInterrupt
            go.wait(60)
            done.set()
        try: cpu.run_in_threads(kernel, (t,), (), 2, 2)
        except KeyboardInterrupt: return weakref.ref(t),go,done
    alive,go,done = interrupted()
    gc.collect()
    assert alive() is not None
    go.set()
    assert done.wait(60)
    for _ in range(600):
        if alive() is None: break
        time.sleep(.01)
    assert alive() is None


def train(steps=5):
    torch.manual_seed(3)
    (x,w,_),losses = tensors(64),[]
    w.requires_grad_()
    for _ in range(steps):
        loss = (linear_dropconnect(x, w, p=0.3) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses


def test_two_threads_train_at_the_same_time(monkeypatch):
    "Each thread has its own seed, and only the sums are compared, because torch's generator is shared"
    monkeypatch.setattr(cpu, 'n_threads_for', lambda work: 2)
    work = [(tensors(200, 300, 90),draw_seed()) for _ in range(2)]
    alone = [[t.clone() for t in (cpu.forward(x, w, s, 9000), *cpu.grads(g, x, w, s, 9000))] for (x,w,g),s in work]
    wrong = []
    def many(j):
        (x,w,g),s = work[j]
        for _ in range(20):
            res = [cpu.forward(x, w, s, 9000), *cpu.grads(g, x, w, s, 9000)]
            if not all(torch.equal(a, b) for a,b in zip(res, alone[j])): wrong.append(j)
    threads = [threading.Thread(target=many, args=(j,)) for j in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_fork_after_the_first_use_works():
    code = '''
import os, signal, torch
from fastai_dropconnect.kernels import numba as cpu, threads
from fastai_dropconnect.masks import draw_seed
cpu.n_threads_for = lambda work: 2
x,w,seed = torch.randn(64, 300),torch.randn(90, 300),draw_seed()
want = cpu.forward(x, w, seed, 9000)
threads._lock.acquire()        # as if another thread were just making the pool
pid = os.fork()
if pid==0:
    signal.alarm(60)       # a child that waits for threads of its parent is ended
    os._exit(0 if torch.equal(cpu.forward(x, w, seed, 9000), want) and torch.equal(cpu.forward(x, w, seed, 9000), want) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))'''
    assert run(code)=='0'


_three_calls = """
import threading, torch
from fastai_dropconnect.kernels import numba as cpu
seed = torch.tensor(3)
def call(dtype): cpu.forward(torch.ones(4, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), seed, 9000)
threads = [threading.Thread(target=call, args=(dtype,)) for dtype in (torch.float32, torch.float64)]
for t in threads: t.start()
for t in threads: t.join()
call(torch.float32)
"""


def test_the_first_compilation_is_announced_once(tmp_path):
    "With an empty cache one line on stderr says what takes so long; a filled cache needs none. Warnings are errors here"
    flags,env = ('-W', 'error', '-W', 'ignore::DeprecationWarning'),dict(NUMBA_CACHE_DIR=str(tmp_path))
    first = process(_three_calls, *flags, **env).stderr.splitlines()
    assert len(first)==1 and first[0].startswith('fastai_dropconnect: compiling the CPU kernels') and str(tmp_path) in first[0], first
    assert process(_three_calls, *flags, **env).stderr==''


def test_compilations_of_others_are_not_announced(tmp_path):
    code = """
import numba
from fastai_dropconnect.kernels import numba as cpu
@numba.njit
def twice(x): return 2*x
print(twice(3))"""
    res = process(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert res.stdout.strip()=='6' and 'compiling' not in res.stderr


def test_training_is_the_same_with_and_without_numba():
    code = f'''
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from fastai_dropconnect.functional import choose_backend
from test_kernels import train
print(choose_backend('cpu'), train())'''
    def losses(**env):
        backend,rest = run(code, **env).split(' ', 1)
        return backend,torch.tensor(eval(rest))
    numba,a = losses()
    torch_,b = losses(NUMBA_DISABLE_JIT='1')
    assert (numba,torch_)==('numba','torch')
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize('cpu,before', [('haswell','sys.stderr = None'), ('generic','sys.stderr.close()')])
def test_processors_without_avx512_make_the_same_sums(cpu, before, tmp_path):
    "Compiled for another processor, also without stderr to say so. Sums of whole numbers are exact, so any difference is one of the masks"
    code = f'''
import sys, torch
from fastai_dropconnect.kernels import numba as cpu, torch as reference
{before}
x,w,g = (torch.randint(-9, 9, s).float() for s in ((11,40), (7,40), (11,7)))
seed = torch.tensor(123456789123)
same = torch.equal(cpu.forward(x, w, seed, 300_000), reference.forward(x, w, seed, 300_000))
both = zip(cpu.grads(g, x, w, seed, 300_000), reference.grads(g, x, w, seed, 300_000))
print(same and all(torch.equal(a, b) for a,b in both), any('zmm' in a for a in cpu._forward.inspect_asm().values()))'''
    if platform.machine() not in ('x86_64','AMD64') and cpu!='generic': pytest.skip(f'{cpu} is no name of this kind of processor')
    assert run(code, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES='', NUMBA_CACHE_DIR=str(tmp_path))=='True False'


@pytest.mark.skipif(sys.platform!='linux', reason='other systems have no peak of memory in these units')
def test_memory_is_that_of_the_inputs():
    "n*out*in is 512 million: the mask would take 512 MB as bytes"
    code = '''
import resource, torch
from fastai_dropconnect.kernels import numba as cpu
from fastai_dropconnect.masks import draw_seed
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
args = torch.randn(1024, 1000),torch.randn(500, 1000),torch.randn(1024, 500)
def step(x, w, g):
    seed = draw_seed()
    cpu.forward(x, w, seed, 9000), cpu.grads(g, x, w, seed, 9000)
step(*[t[:4] if len(t)==1024 else t for t in args])     # compiles
before = peak()
step(*args)
print(peak()-before)'''
    assert float(run(code)) < 60


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='needs Triton')
def test_the_cuda_kernels_compile_for_real_processors():
    "Triton's compiler makes machine code for GPUs that this machine does not have"
    code = '''
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastai_dropconnect.kernels import triton as K
for f,sums in ((K._forward, 'y'), (K._grad_input, 'gx'), (K._grad_weight, 'gw')):
    for ptr,dtype in (('fp32',tl.float32), ('bf16',tl.float32), ('fp64',tl.float64)):
        kinds = dict(seed='*i64', limits='*u8', **{k: 'i32' for k in ('n','n_out','n_in','part_blocks')}, **{k: 'constexpr' for k in ('strict','O','M','dtype')})
        if ptr=='bf16': kinds['gw'] = '*fp32'
        sig = {a: kinds.get(a, '*'+ptr) for a in f.arg_names}
        res = triton.compile(ASTSource(fn=f, signature=sig, constexprs=dict(strict=False, O=K._piece_outs, M=K._piece_words, dtype=dtype)), target=GPUTarget('cuda', 90, 32))
        assert '.local' not in res.asm['ptx'] and len(res.asm['cubin'])>1000
print('compiled')'''
    env = {'TRITON_INTERPRET': '0', 'PYTHONWARNINGS': 'ignore'}
    assert run(code, **env)=='compiled'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_makes_the_same_sums_as_the_cpu(dtype):
    from fastai_dropconnect.kernels import triton as cuda
    (x,w,g),seed,tol = tensors(70, 90, 33, dtype),draw_seed(),dict(rtol=2e-2, atol=1e-1) if dtype!=torch.float32 else dict(rtol=1e-4, atol=1e-3)
    gpu = [t.cuda() for t in (x,w,g,seed)]
    torch.testing.assert_close(cuda.forward(gpu[0], gpu[1], gpu[3], 9000).cpu(), cpu.forward(x, w, seed, 9000), **tol)
    for a,b in zip(cuda.grads(gpu[2], gpu[0], gpu[1], gpu[3], 9000), cpu.grads(g, x, w, seed, 9000)): torch.testing.assert_close(a.cpu(), b, **tol)
