"The only look at the test rows: the chosen hyperparameters, fitted to all other rows"
import time
from dataclasses import dataclass
from .families import Family
from .search import score
from .spaces import Limits
from .tables import Table


@dataclass(frozen=True)
class Result:
    "One fit, judged on the test rows"
    test:float      # Score
    seconds:float   # CPU time of the fit, in one thread
    megabytes:float # Of what is kept to predict


def refit(
    family:Family,
    table:Table,
    test, # Test rows
    params:dict, # From `search`
    seed:int, # Of this fit
    limits:Limits
) -> Result:
    "Fit to the rows of training and validation, and look at the test rows"
    rows = table.development
    family.fit(table, rows[:512], params, seed, Limits(1, 1))      # compiles what is compiled at first use
    start = time.process_time()
    fitted = family.fit(table, rows, params, seed, limits)
    seconds = time.process_time()-start
    return Result(score(table, test[table.target].to_numpy(), fitted.predict(test)), seconds, fitted.size/1e6)
