"A table and a figure of all results, with a mark where an aim is reached"
from dataclasses import dataclass
from collections.abc import Callable
import pandas as pd
from matplotlib.figure import Figure
from .families import FAMILIES


def summary(
    results:pd.DataFrame # With the same setup for each data set
) -> pd.DataFrame: # A row for each data set and family, the best first
    "Compute means and standard deviations over the seeds"
    g = results.groupby(['dataset','family'], sort=False)
    res = g[['valid','test','seconds','megabytes']].mean().assign(sd=g.test.std(), seeds=g.size(), metric=g.metric.first()).reset_index()
    res['_rank'] = res.test.where(res.metric=='rmse', -res.test)
    return res.sort_values(['dataset','_rank'], kind='stable').drop(columns='_rank').reset_index(drop=True)


@dataclass(frozen=True)
class Aim:
    "What a technique of this package should reach"
    dataset:str
    mark:str
    text:str
    reached:Callable       # Of a row, and a function from a family's name to its row or `None`

def _below(share, name): return lambda r, row: row(name) is not None and r.test <= share*row(name).test
def _fast(r, row): return r.seconds <= 2.2*row('fastai').seconds

AIMS = [
    Aim('bulldozers', 'a', 'at least 5 % below plain fastai at no more than 2.2 times its time', lambda r, row: _below(.95, 'fastai')(r, row) and _fast(r, row)),
    Aim('bulldozers', 'b', 'at least 4 % below LightGBM', _below(.96, 'lightgbm')),
    Aim('california', 'c', 'below 0.4326', lambda r, row: r.test<.4326),
    Aim('california', 'd', 'below 0.4288', lambda r, row: r.test<.4288),
    Aim('california', 'e', 'below LightGBM of this table', _below(1, 'lightgbm')),
    Aim('adult', 'f', 'AUC at least 0.920', lambda r, row: r.test>=.92),
    Aim('adult', 'g', 'AUC at least 0.9275', lambda r, row: r.test>=.9275)]


AIM_SEEDS = 3      # An aim needs a mean over at least this many seeds

def aims_reached(
    board:pd.DataFrame, # From `summary`
    full:list # Complete data sets, the only ones that the aims are for
) -> list: # The marks for each row, as text
    "Find the aims that each row reaches; only families that use this package can"
    def row(dataset, name):
        found = board[(board.dataset==dataset)&(board.family==name)]
        return found.iloc[0] if len(found) else None
    def marks(r):
        if r.dataset not in full or r.seeds<AIM_SEEDS or r.family not in FAMILIES or not FAMILIES[r.family].ours: return ''
        return ' '.join(a.mark for a in AIMS if a.dataset==r.dataset and a.reached(r, lambda name: row(r.dataset, name)))
    return [marks(r) for r in board.itertuples()]


def chosen(
    board:pd.DataFrame # From `summary`
) -> list: # A sentence for each data set
    "Say which family the validation rows choose, and whether it is worse than plain fastai by more than the spread"
    lines = []
    for name,b in board.dropna(subset=['valid']).groupby('dataset', sort=False):
        lower = b.metric.iloc[0]=='rmse'
        pick = b.loc[b.valid.idxmin() if lower else b.valid.idxmax()]
        line = f'{name}: chosen on the validation rows: {pick.family}, test {pick.test:.4f} (best on test: {b.iloc[0].family}, {b.iloc[0].test:.4f})'
        plain = b[b.family=='fastai']
        if len(plain):
            worse = (pick.test-plain.test.iloc[0])*(1 if lower else -1)
            spread = max(pick.sd, plain.sd.iloc[0])
            verdict = 'with one seed there is no spread to compare with' if pd.isna(spread) else 'worse by more than the spread' if worse>spread else 'not worse by more than the spread'
            line += f'; plain fastai {plain.test.iloc[0]:.4f}: {verdict}'
        lines.append(line)
    return lines


def board_text(
    board:pd.DataFrame, # From `summary`
    full:list # As for `aims_reached`
) -> str: # Markdown
    "Write the table, the meaning of its marks, and what the validation rows choose"
    number = lambda x, digits: '' if pd.isna(x) else f'{x:.{digits}f}'
    lines = ['| data | family | seeds | validation | test | sd | fit, CPU s | size, MB | aims |', '|---|---|---|---|---|---|---|---|---|']
    for r,marks in zip(board.itertuples(), aims_reached(board, full)):
        lines.append(f'| {r.dataset} | {r.family} | {r.seeds} | {number(r.valid, 4)} | {number(r.test, 4)} | {number(r.sd, 4)} | {number(r.seconds, 1)} | {number(r.megabytes, 2)} | {marks} |')
    metrics = ', '.join(f'{d}: {"RMSE, lower is better" if m=="rmse" else "AUC, higher is better"}' for d,m in dict(zip(board.dataset, board.metric)).items())
    known = [f'{a.mark}: {a.text}' for a in AIMS if a.dataset in full]
    part = [d for d in dict.fromkeys(board.dataset) if d not in full]
    notes = [f'{metrics}. Validation: the best trial of the search. Test: mean over the seeds.', *([f'Aims, for means over at least {AIM_SEEDS} seeds: '+'; '.join(known)+'.'] if known else []),
             *([f'No aims are marked for {", ".join(part)}: made-up data, or a part of it or of the training.'] if part else []), *chosen(board)]
    return '\n'.join([*lines, '', *[f'- {n}' for n in notes]])


def short_text(
    board:pd.DataFrame, # From `summary`
    full:list # As for `aims_reached`
) -> str: # Markdown
    "Write test scores with a row for each family and a column for each data set, the best in bold"
    names = list(dict.fromkeys(board.dataset))
    best = {d: b.index[0] for d,b in board.groupby('dataset', sort=False)}
    cells = {}
    for (i,r),marks in zip(board.iterrows(), aims_reached(board, full)):
        text = f'{r.test:.4f}'
        cells[r.family,r.dataset] = (f'**{text}**' if i==best[r.dataset] else text)+('' if pd.isna(r.sd) else f' ± {r.sd:.4f}')+(f' ({marks})' if marks else '')
    families = [f for f in FAMILIES if f in set(board.family)]
    titles = [f'{d}, {board[board.dataset==d].metric.iloc[0].upper()}' for d in names]
    lines = [f'| | {" | ".join(titles)} |', '|---'*(len(names)+1)+'|', *(f'| {f} | {" | ".join(cells.get((f,d), "") for d in names)} |' for f in families)]
    return '\n'.join(lines)


def plot_board(
    board:pd.DataFrame, # From `summary`
    results:pd.DataFrame # What `board` was made of
) -> Figure:
    "Plot the test scores of each data set: mean and standard deviation, and a gray point for each seed"
    names = list(dict.fromkeys(board.dataset))
    most = max(board.groupby('dataset').size())
    fig = Figure(figsize=(5.2*len(names), 1.4+.3*most), dpi=110, layout='constrained')
    for ax,name in zip(fig.subplots(1, len(names), squeeze=False)[0], names):
        b = board[board.dataset==name]
        for y,r in enumerate(b.itertuples()):
            ours = r.family in FAMILIES and FAMILIES[r.family].ours
            own = results[(results.dataset==name)&(results.family==r.family)].test
            ax.plot(own, [y]*len(own), 'o', color='.75', ms=4)
            ax.errorbar(r.test, y, xerr=None if pd.isna(r.sd) else r.sd, fmt='o', color='C0' if ours else 'C1', ms=6, capsize=3)
        ax.set_yticks(range(len(b)), b.family); ax.invert_yaxis()
        ax.set(title=name, xlabel='test RMSE (lower is better)' if b.metric.iloc[0]=='rmse' else 'test AUC (higher is better)')
        ax.grid(axis='x', alpha=.3); ax.spines[['top','right']].set_visible(False)
    fig.supxlabel('blue: uses this package; orange: does not\nbars: standard deviation over the seeds', fontsize=9)
    return fig
