"Masks: the same seed gives the same mask for good, and one module holds the constants of the hash"
import hashlib, re
from pathlib import Path
import pytest, torch
import fastai_dropconnect
from fastai_dropconnect.masks import HASH_CONSTANTS, draw_seed, drop_limits, drop_probability, drop_threshold, example_mask, exact_mask
from fastai_dropconnect.masks import is_strict, mask_counters


def checksum(mask): return hashlib.sha256(mask.numpy().tobytes()).hexdigest()


# Computed with the first release of these bits. Weights trained from a seed depend on them: they do not change
@pytest.mark.parametrize('seed,p,shape,expected', [
    (0, .5, (8,16,20), '4b7f4fb45f6e1c4285ef4b4f1c8083e42b45832457c2ba32757ec84bcce12286'),
    (-3, .1, (5,7,33), '0fe6e069a2ad2194ace8a5e729924736f26d67932bedf2cb0bfb9c3a4e05e4ae'),
    (2**62+12345, .3, (64,50,100), '6997f7d4dd650acedc1fff133b492735b3d574c6d6be61d13dc3b84d25142b04'),
    (7, .998, (9,11,70), '802ec037706d0af56dc7fb2af82dc51ab64f3846cba771d94816b27fe0929d6c')])
def test_a_seed_gives_the_same_mask_as_ever(seed, p, shape, expected):
    assert checksum(example_mask(torch.tensor(seed), p, *shape))==expected


@pytest.mark.parametrize('per,expected', [('tensor', 'daa4875aab8d4c2639c417feba745cf093d86889ee1ec8f67749dcf9b5c36712'),
                                          ('row', 'c482f223990dbc2c26f40115901a3a9b50fce111d41b6f9b7e5beceaeedc8827')])
def test_a_generator_gives_the_same_exact_mask_as_ever(per, expected):
    assert checksum(exact_mask((100,200), .3, per, torch.Generator().manual_seed(7)))==expected


def constants():
    for value in HASH_CONSTANTS.values(): yield from value if isinstance(value, tuple) else [value]


def test_only_masks_types_a_constant_of_the_hash():
    "Kernels read `HASH_CONSTANTS`: a second copy of a number could change alone"
    package = Path(fastai_dropconnect.__file__).parent
    found = {}
    for file in package.rglob('*.py'):
        numbers = {int(n, 0) for n in re.findall(r'\b0[xX][0-9a-fA-F]+|\b[1-9][0-9]{6,}\b', file.read_text())}
        written = numbers & {n for c in constants() for n in (c, 2**32-c)}
        if written: found[file.relative_to(package).as_posix()] = written
    assert found=={'masks.py': set(constants())}


@pytest.mark.parametrize('p', [1e-12, 1e-7, 9e-7, 1.4e-5, 1/256, .1, 1/3, 255/256, .997, .99998, .9999990, 1-1e-12])
def test_any_p_is_exact_to_a_millionth(p):
    "The mean share of bytes that the limits drop is the probability in force"
    threshold = drop_threshold(p)
    limits = drop_limits(threshold)[:4096].double()
    share = (limits + is_strict(threshold)).mean()/256      # a byte drops below a limit, or up to it if the limits are strict
    assert share==drop_probability(threshold) and abs(share-p)<1e-6
    assert limits.max()<=255 and drop_limits(threshold)[4096:].equal(drop_limits(threshold)[:64])


@pytest.mark.parametrize('p', [2e-5, .003, .998])
def test_extreme_p_drop_that_share(p):
    dropped = sum((~example_mask(draw_seed(), p, 64, 100, 500)).sum().item() for _ in range(10))
    n = 10*64*100*500
    assert abs(dropped-n*p) < 5*(n*p*(1-p))**.5


def test_no_two_of_a_million_inputs_share_a_mask():
    "A mask is made of the counter of its word and the byte in it: no two inputs have the same, in any row block"
    for block in 0,1,77:
        counters = mask_counters(torch.tensor(3), range(block, block+1), 2**20)[0]
        assert counters.unique().numel()==2**20
    last = example_mask(torch.tensor(3), .5, 8, 64, 2**16).permute(2, 0, 1).reshape(2**16, -1)[-4096:]
    assert last.unique(dim=0).shape[0]==4096


def test_masks_of_inputs_256_apart_and_of_rows_four_apart_are_uncorrelated():
    "They read the same list of limits, from places that do not depend on each other"
    m = torch.cat([(~example_mask(torch.tensor(s), .002, 64, 200, 512)).float() for s in range(10)]) - .002
    r = m.unflatten(0, (-1, 8))
    for a,b in (m[...,:256], m[...,256:]),(r[:,:4], r[:,4:]):
        z = (a*b).mean()/(.002*.998) * a.numel()**.5
        assert abs(z)<4


def test_the_seed_follows_the_generator_of_torch():
    torch.manual_seed(3)
    seeds = [draw_seed().item() for _ in range(100)]
    torch.manual_seed(3)
    assert [draw_seed().item() for _ in range(100)]==seeds and len(set(seeds))==100
    assert min(seeds) < -2**61 and max(seeds) > 2**61     # all 64 bits


@pytest.mark.parametrize('shape', [(0,5), (5,0), (1,1), (7,), (3,4,5)])
@pytest.mark.parametrize('per', ['tensor', 'row'])
def test_exact_masks_of_any_shape(shape, per):
    mask = exact_mask(shape, .5, per)
    assert mask.shape==shape and mask.dtype==torch.bool
    if mask.numel() and per=='tensor': assert (~mask).sum()==round(.5*mask.numel())
