"The only use of the test rows: evaluate the chosen hyperparameters, fitted to all other rows"
import time
from dataclasses import dataclass
from .families import Family
from .search import score
from .spaces import Limits
from .tables import Table


@dataclass(frozen=True)
class Result:
    "One fit, evaluated on the test rows"
    test:float      # Score
    seconds:float   # CPU time of the fit, in one thread
    megabytes:float # Size of what is kept to predict


def refit(
    family:Family,
    table:Table,
    test, # Test rows
    params:dict, # From `search`
    seed:int, # Seed of this fit
    limits:Limits
) -> Result:
    "Fit to the training and validation rows, and evaluate on the test rows"
    rows = table.development
    family.fit(table, rows[:512], params, seed, Limits(1, 1))      # warm up: some code compiles at its first use
    start = time.process_time()
    fitted = family.fit(table, rows, params, seed, limits)
    seconds = time.process_time()-start
    return Result(score(table, test[table.target].to_numpy(), fitted.predict(test)), seconds, fitted.size/1e6)
