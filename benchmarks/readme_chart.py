"""Draws README's chart from `results/accuracy.csv`: `python -m benchmarks.readme_chart`

Change of the test error against plain fastai on three tables, in percent. Error is RMSE or 1-AUC."""
from pathlib import Path
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

RESULTS = Path(__file__).parent/'results'
PLAIN = 'fastai'
TITLES = { # data set: title, error
    'bulldozers': ('Auctions\n16,825 sales, split by time', 'RMSE'),
    'adult': ('Adult\n48,842 persons, at random', '1 \u2212 AUC'),
    'california': ('California housing\n20,640 districts, at random', 'RMSE')}
MODELS = { # family in accuracy.csv: label, whether it uses this package
    'zero-restarts': ('zero restarts', True),
    'masked-zero-restarts+ple': ('zero restarts, members\nand vectors', True),
    'fastai+ple': ('vectors for numbers', True),
    'dropconnect-example': ('DropConnect', True),
    'tabm+ple': ('TabM with vectors', False),
    'catboost': ('CatBoost', False),
    'lightgbm': ('LightGBM', False)}
CAPTION = '''Test error against plain fastai (line at 0); further left is better, blue uses this package.
Mean over three seeds, bars: one standard deviation, grey band: that of plain fastai. \
Same six-trial search for every model, one CPU thread.'''
OURS, OTHER, TEXT, GRID = '#1f6fb2', '#6e7781', '#24292f', '#d8dee4'     # readable on a white page


def changes(
    results:pd.DataFrame # Lines of accuracy.csv
) -> pd.DataFrame: # A row for each data set and family: mean and standard deviation over the seeds, in percent
    "Return the change of the error against plain fastai"
    error = results.test.where(results.metric=='rmse', 1-results.test)
    runs = results.assign(error=error).groupby(['dataset','family']).error.agg(['mean','std'])
    plain = runs.xs(PLAIN, level='family')['mean'].reindex(runs.index, level='dataset')
    return pd.DataFrame(dict(change=100*(runs['mean']/plain-1), sd=100*runs['std']/plain))


def draw(
    results:pd.DataFrame # Lines of accuracy.csv
) -> Figure: # Three panels that share their rows
    "Draw the change against plain fastai, a panel for each data set"
    table = changes(results)
    fig = Figure(figsize=(9.6,3.9), dpi=180, layout='constrained', facecolor='white')
    axs = fig.subplots(1, len(TITLES), sharey=True)
    for ax,(dataset,(title,error)) in zip(axs, TITLES.items(), strict=True):
        _panel(ax, table.loc[dataset], title, error)
    axs[0].set_yticks(range(len(MODELS)), [label for label,_ in MODELS.values()], color=TEXT, fontsize=10)
    axs[0].invert_yaxis()
    for tick,(_,ours) in zip(axs[0].get_yticklabels(), MODELS.values(), strict=True):
        if ours: tick.set(color=OURS, fontweight='bold')
    fig.supxlabel(CAPTION, fontsize=8.5, color='#57606a')
    return fig


def _panel(ax, table, title, error):
    "Draw the models of one data set"
    ax.axvspan(-table.sd[PLAIN], table.sd[PLAIN], color=GRID, alpha=.6, lw=0)
    ax.axvline(0, color='#57606a', lw=1)
    for y,(family,(_,ours)) in enumerate(MODELS.items()):
        row,color = table.loc[family],OURS if ours else OTHER
        ax.errorbar(row.change, y, xerr=row.sd, fmt='o', ms=7, color=color, elinewidth=1.6, capsize=3)
        text = f'{row.change:+.1f} %'.replace('-', '\u2212')
        ax.annotate(text, (row.change, y), (0, 7), textcoords='offset points', ha='center', fontsize=9, color=color,
                    path_effects=[withStroke(linewidth=3, foreground='white')])     # readable across lines
    ax.set_title(title, fontsize=10, color=TEXT)
    ax.set_xlabel(f'change of {error}, %', fontsize=9, color=TEXT)
    ax.tick_params(axis='y', length=0)
    ax.tick_params(axis='x', labelsize=8.5, color=GRID, labelcolor=TEXT)
    ax.grid(axis='x', color=GRID, lw=.7)
    ax.set_axisbelow(True)
    ax.spines[['top','right','left']].set_visible(False)
    ax.spines['bottom'].set_color(GRID)
    ax.margins(x=.14)
    ax.set_ylim(-.7, len(MODELS)-.5)


if __name__=='__main__': draw(pd.read_csv(RESULTS/'accuracy.csv')).savefig(RESULTS/'readme.png')
