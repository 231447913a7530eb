"""Recipes of AFID's published code."""

from fastokd.train.config import TrainConfig


def cifar100_wrn16_2_afid() -> TrainConfig:
    """AFID with WRN-16-2 on CIFAR-100; its paper's number is not at hand.

    SGD with Nesterov momentum 0.9, learning rate 0.1 (its readme: 0.2) multiplied by 0.1 after epochs 150 and 225 of 301,
    batches of 128, weight decay 2e-4, of the fusion head 1e-5, T = 3, 1e-7 on the teachers' rows (preset ``code``), ramp-up
    over 80 epochs.
    """
    return TrainConfig(model="wrn16_2", method="afid", preset="code", branches=2, ramp_epochs=80, epochs=301, batch_size=128, lr=0.1,
                       lr_decay_at=(150 / 301, 225 / 301), lr_gamma=0.1, momentum=0.9, nesterov=True, weight_decay=2e-4, pad=4, flip=True)
