"""One call against boosted trees, forests and other networks, on fifteen real tables with fixed splits

    make bench-arena                                       # everything: many hours on one core
    make bench-arena ARGS=--quick                          # four methods, three tables and few rows, in minutes
    python -m benchmarks.arena --tables credit,ames --methods ours,lgbm,rf --seeds 2

`tables` reads and splits, `outsiders` and `ours` fit, `results` keeps one line per fit, `ranking` compares, `report` makes the tables and
the figure, and `__main__` is the command. Every method has its authors' defaults, and stops or chooses by the same validation rows.
"""
