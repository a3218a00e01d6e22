"Run notebooks in one process, in a random order, and say which fail: `python tests/one_process.py --seed 1 2* 35*` finds lessons that depend on what others did before"
import argparse, random, sys, time
from pathlib import Path

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('patterns', nargs='*', default=['*'], help="which notebooks, such as '2*'")
    parser.add_argument('--seed', type=int, default=0, help='of the order')
    parser.add_argument('--seconds', type=float, default=float('inf'), help='start no notebook after this long')
    args = parser.parse_args()
    from nbdev.test import test_nb
    folder,start,failed = Path(__file__).parent.parent/'nbs',time.time(),[]
    names = sorted({f for p in args.patterns for f in folder.glob(f'{p}.ipynb')})
    random.Random(args.seed).shuffle(names)
    done = []
    for file in names:
        if time.time()-start>args.seconds: break
        ok,seconds = test_nb(file, basepath=folder.parent)
        done.append(file.stem)
        if not ok: failed.append(file.stem)
        print(f'{"ok" if ok else "FAILED":7}{seconds:5.0f} s  {file.stem}', flush=True)
    print(f'{len(done)} of {len(names)} notebooks, seed {args.seed}, {len(failed)} failed: {failed}')
    sys.exit(bool(failed))

if __name__=='__main__': main()
