"""Table and figure of the results: `python -m benchmarks.sparsity.report`"""
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse

RESULTS = Path(__file__).parent.parent/'results'


def summary(
    rows:pd.DataFrame # From the CSV file
) -> pd.DataFrame: # Means over seeds
    "Average the seeds"
    by = ['task','method','target','epochs','metric']
    res = rows.groupby(by, sort=False).agg(error=('error','mean'), seeds=('seed','count'), times=('times','mean'),
                                           macs_times=('macs_times','mean'), units=('units','first'), seconds=('seconds','mean'))
    plain = rows[rows.method=='plain'].groupby(['task','epochs']).seconds.mean()
    res = res.reset_index()
    res['time'] = [s/plain.get((t,e), float('nan')) for s,t,e in zip(res.seconds, res.task, res.epochs)]
    return res.drop(columns='seconds').round(dict(times=1, macs_times=1, time=2))


def markdown(table:pd.DataFrame) -> str:
    "Write a table in Markdown"
    def cell(v): return f'{v:.4g}' if isinstance(v, float) else str(v)
    lines = [list(table.columns), ['---']*len(table.columns), *[[cell(v) for v in row] for row in table.itertuples(index=False)]]
    return '\n'.join('| '+' | '.join(l)+' |' for l in lines)


AXES = dict(times='times fewer live weights', macs_times='times fewer multiply-adds')

def plain_ticks(axis, low, high):
    "Write plain numbers along a logarithmic axis, as many as there is room for"
    steps = (1,1.2,1.4,1.6,1.8,2,2.5) if high<3*low else (1,2,5,10,20,50) if high<100*low else (1,5,20,100,500)
    ticks = [t for t in steps if low<=t<=high]
    axis.set_ticks(ticks, [f'{t:g}' for t in ticks])
    axis.set_ticks([], minor=True)

def panel(ax, part, x, methods):
    "Plot the error of a task against one measure of size"
    for method,line in part.groupby('method', sort=False):
        line = line.sort_values(x)
        ax.plot(line[x], line.error, 'o-' if len(line)>1 else 'o', color=f'C{methods.index(method)}', label=method)
    ax.set(xscale='log', xlabel=AXES[x], ylabel=part.metric.iloc[0], title=part.task.iloc[0])
    plain_ticks(ax.xaxis, *ax.get_xlim())
    if part.error.min()>0 and part.error.max()>10*part.error.min():
        ax.set_yscale('log')
        if part.error.min()>.1: plain_ticks(ax.yaxis, *ax.get_ylim())
    ax.legend(fontsize='x-small', frameon=False)

def figure(
    rows:pd.DataFrame # From `summary`
) -> plt.Figure:
    "Plot the error of each task against how many times fewer live weights, and multiply-adds, there are"
    tasks,methods = rows.task.unique(),list(rows.method.unique())
    n_rows = -(-len(tasks)//2)
    fig,axs = plt.subplots(n_rows, 4, figsize=(13.6, 3*n_rows), squeeze=False, layout='constrained')
    pairs = axs.reshape(-1, 2)
    for pair in pairs[len(tasks):]: [ax.axis('off') for ax in pair]
    for pair,task in zip(pairs, tasks):
        for ax,x in zip(pair, AXES): panel(ax, rows[rows.task==task], x, methods)
    return fig


@call_parse
def main(
    csv:str=str(RESULTS/'sparsity.csv'), # Results
    out:str=str(RESULTS/'sparsity') # Where `.md` and `.png` go
):
    "Print the table, and write it with the figure"
    table = summary(pd.read_csv(csv))
    text = markdown(table)
    Path(f'{out}.md').write_text(text+'\n')
    figure(table).savefig(f'{out}.png', dpi=80)
    print(text)
