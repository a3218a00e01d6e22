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


def figure(
    rows:pd.DataFrame # From `summary`
) -> plt.Figure:
    "Plot the error of each task against how many times fewer live weights there are"
    tasks = rows.task.unique()
    n = min(len(tasks), 3)
    fig,axs = plt.subplots(-(-len(tasks)//n), n, figsize=(3.4*n, 3*-(-len(tasks)//n)), squeeze=False, layout='constrained')
    methods = list(rows.method.unique())
    for ax in axs.flat[len(tasks):]: ax.axis('off')
    for ax,task in zip(axs.flat, tasks):
        part = rows[rows.task==task]
        for method,line in part.groupby('method', sort=False):
            line = line.sort_values('times')
            ax.plot(line.times, line.error, 'o-' if len(line)>1 else 'o', color=f'C{methods.index(method)}', label=method)
        ax.set(xscale='log', xlabel='times fewer live weights', ylabel=part.metric.iloc[0], title=task)
        low,high = ax.get_xlim()
        ticks = [t for t in (1,2,5,10,20,50,100,200) if low<=t<=high]
        ax.set_xticks(ticks, map(str, ticks))
        ax.set_xticks([], minor=True)
        if part.error.min()>0 and part.error.max()>30*part.error.min(): ax.set_yscale('log')
        ax.legend(fontsize='x-small', frameon=False)
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
