"""Which calibration error a perfect model would show on the test rows of adult, and which one networks show

    python -m benchmarks.uncertainty.chance

An ECE of 15 bins is never 0: the share of ones in a bin differs from its mean probability by chance.
"""
import warnings
import numpy as np, torch
from fastai_dropconnect.ensemble.blend import best_temperature
from fastai_dropconnect.uncertainty.metrics import expected_calibration_error
from ..accuracy.tables import Options
from .data import load
from .methods import Networks
from .score import ece_by_chance

SEEDS = 3


def calibrated(data, seed) -> tuple: # Probabilities and targets of the test rows
    "Train a plain network, and divide its logits by the temperature of the validation rows"
    networks = Networks(data, seed)
    valid,test = [torch.as_tensor(networks.predict(networks.fit(), i).logits) for i in (1,2)]
    y,y_test = [torch.as_tensor(data.parts[i][data.target].to_numpy()) for i in (1,2)]
    return (test/best_temperature(valid, y)).softmax(1),y_test

def main():
    data = load('adult', Options())
    print('| seed | ECE15 | by chance: mean | 5 % | 95 % |\n|---|---|---|---|---|')
    for seed in range(SEEDS):
        probs,y = calibrated(data, seed)
        chance = ece_by_chance(probs)
        cells = [float(expected_calibration_error(probs, y)),chance.mean(),*np.quantile(chance, [.05,.95])]
        print(f'| {seed} | ' + ' | '.join(f'{v:.4f}' for v in cells) + ' |', flush=True)


if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    main()
