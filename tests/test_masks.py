"Masks: the same seed gives the same mask for good, and one module holds the constants of the hash"
import hashlib, re
from pathlib import Path
import pytest, torch
import fastai_dropconnect
from fastai_dropconnect.masks import HASH_CONSTANTS, draw_seed, example_mask, exact_mask


def checksum(mask): return hashlib.sha256(mask.numpy().tobytes()).hexdigest()


# Computed with the first release of these bits. Weights trained from a seed depend on them: they do not change
@pytest.mark.parametrize('seed,p,shape,expected', [
    (0, .5, (8,16,20), 'b27a959d9fd99e174a9e8ce6ed331e738af9afc12badac990456bf9553c38e1c'),
    (-3, .1, (5,7,33), '27cb761e1c575ca085a61a1d63015a04ad830f3013bf817134fb418d47fd9328'),
    (2**62+12345, .3, (64,50,100), 'b047646f4d4775a20078851a6210cfa845516bcb03370f05b5e77a3709a78a15')])
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
