"Two hundred short random histories of Learners; `python tests/histories.py --n 10000` runs longer ones"
import pytest
import histories

@pytest.mark.parametrize('start', range(0, 200, 20))
def test_what_must_hold_after_every_step(start):
    for seed in range(start, start+20): histories.check(seed, 4)
