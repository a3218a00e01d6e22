"Search spaces: each hyperparameter has a range and a default, which is the first trial"
from dataclasses import dataclass


@dataclass(frozen=True)
class Real:
    low:float
    high:float
    default:float
    log:bool = False
    def suggest(self, trial, name): return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Whole:
    low:int
    high:int
    default:int
    log:bool = False
    def suggest(self, trial, name): return trial.suggest_int(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    options:tuple      # The first is the default
    @property
    def default(self): return self.options[0]
    def suggest(self, trial, name): return trial.suggest_categorical(name, self.options)


def defaults(space:dict) -> dict: return {n:s.default for n,s in space.items()}

def suggest(space:dict, trial) -> dict: return {n:s.suggest(trial, n) for n,s in space.items()}


@dataclass(frozen=True)
class Limits:
    "Upper limits that keep `--quick` quick"
    epochs:int = 10**6
    trees:int = 4000


@dataclass
class Fitted:
    "A fitted model"
    predict:object     # Function from a frame to the predicted numbers, or the probabilities of 1
    size:int           # Bytes kept to predict
    found:dict = None  # Hyperparameters that early stopping on the validation rows found
