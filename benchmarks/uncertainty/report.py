"Tables and the figure"
import numpy as np, pandas as pd

NUMBERS = ['rmse','crps','coverage','width','winkler','worst_quarter']
CLASSES = ['log_loss','brier','ece','temperature']
BEST = {'raw': 'as predicted', 'split': 'split', 'local': 'local', 'cqr': 'CQR', 'last 500': 'last 500 sales',
        'last 500, ends apart': 'last 500 sales, ends apart', 'temperature': 'temperature'}


def shown_calibration(rows:pd.DataFrame) -> str: # Of a method
    "Return the calibration that `learn.calibrate` chooses, or that a table of distributions is for"
    if rows.dataset.iloc[0]=='auctions_drift': return 'last 500, ends apart'
    method = rows.method.iloc[0]
    if method=='plain': return 'split'
    is_dist = any(w in method for w in ('gaussian','mixture','quantile')) and not method.startswith(('MC','plain'))
    return 'cqr' if is_dist else 'local'

def _cell(x):
    x = x.dropna()
    if not len(x): return ''
    return f'{x.mean():.4f}' + (f' ± {x.std():.4f}' if len(x)>1 else '')

def table(rows:pd.DataFrame) -> str: # Markdown
    "Write a table of one data set: mean and standard deviation over the seeds"
    columns = [c for c in (*NUMBERS, *CLASSES) if rows[c].notna().any()]
    lines = ['| method | calibration | seeds | ' + ' | '.join(columns) + ' | training CPU s |', '|---'*(len(columns)+4)+'|']
    for (method,calibration),g in rows.groupby(['method','calibration'], sort=False):
        cells = [_cell(g[c]) for c in columns]
        lines.append(f'| {method} | {BEST[calibration]} | {g.seed.nunique()} | ' + ' | '.join(cells) + f' | {g.train_s.mean():.1f} |')
    return '\n'.join(lines)

def report_text(results:pd.DataFrame) -> str:
    "Write all tables"
    return '\n\n'.join(f'## {name}\n\n{table(g)}' for name,g in results.groupby('dataset', sort=False))+'\n'

def _bars(ax, rows, value):
    means,names = [],[]
    for method,g in rows.groupby('method', sort=False):
        chosen = g[g.calibration==('temperature' if value=='log_loss' else shown_calibration(g))]
        if len(chosen): means.append((chosen[value].mean(),chosen[value].std(),chosen.coverage.mean())); names.append(method)
    order = np.argsort([-m[0] for m in means])
    means,names = [means[i] for i in order],[names[i] for i in order]
    ours = ['tab:orange' if not n.startswith(('Cat','Light')) else 'tab:gray' for n in names]
    ax.barh(names, [m[0] for m in means], xerr=np.nan_to_num([m[1] for m in means]), color=ours, alpha=.85)
    low,high = min(m[0] for m in means),max(m[0] for m in means)
    ax.set_xlim(max(0, low-.5*(high-low)-.01), high+.15*(high-low)+.001)
    for i,m in enumerate(means):
        if m[2]==m[2]: ax.text(ax.get_xlim()[0], i, f' {m[2]:.0%}', va='center', fontsize=7, color='white')

def plot(results:pd.DataFrame): # A figure
    "Draw the score of each method after calibration"
    import matplotlib.pyplot as plt
    names = list(results.dataset.unique())
    n = -(-len(names)//2)
    fig,axs = plt.subplots(n, 2, figsize=(12, 4*n), layout='constrained', squeeze=False)
    for ax,name in zip(axs.flat, names):
        rows = results[results.dataset==name]
        value = 'log_loss' if rows.log_loss.notna().any() else 'winkler'
        _bars(ax, rows, value)
        ax.set_title(f'{name}: ' + ('log loss after temperature' if value=='log_loss' else 'Winkler score of 90 % intervals, calibrated'), fontsize=9)
        ax.tick_params(labelsize=7)
    for ax in axs.flat[len(names):]: ax.set_visible(False)
    fig.suptitle('Shorter bars are better, their axes do not begin at 0; white: share of test rows within their interval', fontsize=9)
    return fig
