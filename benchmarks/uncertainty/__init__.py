"""Compare predictive distributions on real tables

    python -m benchmarks.uncertainty --data TrainAndValid.csv

Networks and trees train on the training rows, are calibrated on the validation rows, and look at the test rows once.
"""
