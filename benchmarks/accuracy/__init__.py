"""What the techniques are worth on real tables, beside gradient boosting, forests and TabM

    make bench-accuracy                                    # everything: many hours on one core
    make bench-accuracy ARGS=--quick                       # a small subset, in minutes
    python -m benchmarks.accuracy --datasets california --families fastai,lightgbm --trials 10 --seeds 3

`tables` reads and splits, `families` has the models and what is searched for each, `search` chooses on the validation rows,
`refit` looks at the test rows, `report` makes the table and the figure, `__main__` is the command.
"""
