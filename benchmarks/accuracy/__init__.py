"""Accuracy of the techniques on real tables, compared with gradient boosting, forests and TabM

    make bench-accuracy                                    # everything: many hours on one core
    make bench-accuracy ARGS=--quick                       # a small subset, in minutes
    python -m benchmarks.accuracy --datasets california --families fastai,lightgbm --trials 10 --seeds 3

`tables` reads and splits. `families` lists the models and their search spaces; the networks are recipes of `fastai_dropconnect.recipes`.
`search` chooses hyperparameters on the validation rows, `refit` evaluates them on the test rows, `report` makes the table and the figure,
and `__main__` is the command.
"""
