"""dieharder's tests of the random bits of `fastai_dropconnect.masks`, in four orders, and of two controls

    python benchmarks/dieharder.py                                                  # writes results/dieharder.csv, prints a summary
    python benchmarks/bits.py --stream ours --order rows | dieharder -g 200 -d 2    # one test by hand

dieharder calls a p-value below 0.005 or above 0.995 weak. With 100 p-values per test, 2 % of good generators are above, because its
Kolmogorov-Smirnov test compares with steps of 1/101. A weak test runs once more, on the next numbers of the same stream, four times as many.
"""
import argparse, csv, subprocess, sys
from collections import namedtuple
from pathlib import Path
import bits

Row = namedtuple('Row', 'generator order test n samples p_values p assessment')
jobs = [*(('ours', order) for order in bits.orders), ('philox', 'inputs'), ('no_xorshift', 'inputs')]
many = ['0','1','2','3','4','8','9','10','11','12','13','15','16','17 -t 1000000','100','101','102', *[f'200 -n {n}' for n in (1,2,4,8)],
        *[f'{d} -n {n}' for d in (201,202) for n in (2,3,4,5)], *[f'203 -n {lag}' for lag in (0,1,3,7,31)]]
once = ['205','206','207','208','209']     # slow; dieharder's default is a single p-value
shown = [o for name in ('test_name','ntuple','tsamples','psamples','pvalues','assessment') for o in ('-D', name)]

def read(kind, order, text):
    "Parse what dieharder prints"
    lines = [[c.strip() for c in line.split('|')] for line in text.splitlines() if line.count('|')==5]
    return [Row(kind, order, c[0], *map(int, c[1:4]), float(c[4]), c[5]) for c in lines]

def measure(kind, order, tests):
    "Run `tests` on one stream: pairs of dieharder's options and a number of p-values"
    feed = subprocess.Popen([sys.executable, bits.__file__, '--stream', kind, '--order', order], stdout=subprocess.PIPE)
    def run(options, p_values):
        cmd = ['dieharder', '-g', '200', '-d', *options.split(), '-p', str(p_values), *shown]
        return read(kind, order, subprocess.run(cmd, stdin=feed.stdout, capture_output=True, text=True, check=True).stdout)
    try:
        for options,p_values in tests:
            rows = run(options, p_values)
            yield from rows
            if any(r.assessment=='WEAK' for r in rows): yield from run(options, 4*p_values)
    finally:
        feed.kill()
        feed.wait()

def summary(rows):
    "Print the number of results by assessment for each stream, repeated tests separately"
    print(f'{"generator":>12} {"order":>8} {"tests":>5} {"weak":>5} {"failed":>6}   of those repeated: {"weak":>5} {"failed":>6}   smallest p  largest p')
    for kind,order in dict.fromkeys(r[:2] for r in rows):
        seen,parts = set(),([],[])
        for r in rows:
            if r[:2]!=(kind,order): continue
            again = (r.test,r.n,r.samples,r.p_values//4) in seen
            parts[again].append(r)
            if not again: seen.add((r.test,r.n,r.samples,r.p_values))
        count = lambda part, what: sum(r.assessment==what for r in part)
        first,second = parts
        print(f'{kind:>12} {order:>8} {len(first):5} {count(first, "WEAK"):5} {count(first, "FAILED"):6}   {"":18} {count(second, "WEAK"):5} {count(second, "FAILED"):6}'
              f'   {min(r.p for r in first):10.1e} {max(r.p for r in first):10.5f}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--jobs', nargs='+', metavar='GENERATOR:ORDER', default=[':'.join(j) for j in jobs])
    p.add_argument('--p-values', type=int, default=100, help='number for each test; the slow ones have one')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'dieharder.csv', help='CSV file; rows of other streams stay in it')
    a = p.parse_args()
    bits.check_twins()
    for job in a.jobs:
        stream = tuple(job.split(':'))
        new = []
        for r in measure(*stream, [(o, a.p_values) for o in many]+[(o, 1) for o in once]):
            new.append(r)
            print(*r, file=sys.stderr, flush=True)
        old = [Row(*r[:3], *map(int, r[3:6]), float(r[6]), r[7]) for r in list(csv.reader(a.out.open()))[1:]] if a.out.exists() else []
        rows = [r for r in old if r[:2]!=stream]+new
        with a.out.open('w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([Row._fields, *rows])
    summary(rows)

if __name__=='__main__': main()
