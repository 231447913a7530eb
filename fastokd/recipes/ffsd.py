"""Recipes of FFSD's official code (Li et al.)."""

from fastokd.train.config import TrainConfig


def cifar100_resnet32_ffsd() -> TrainConfig:
    """FFSD with ResNet-32 on CIFAR-100; its readme reports leaders at 25.08, 25.18 and 25.18 % error.

    Two students and a leader, T = 2; SGD with Nesterov momentum 0.9, learning rate 0.1 multiplied by 0.1 after epochs 150 and
    225 of 299, batches of 128, weight decay 1e-4, of the fusion head 1e-5, the decoders with Adam at 1e-3; the losses on maps
    ramp up over 5 epochs; random crops from 4 pixels of reflection.
    """
    return TrainConfig(model="resnet32", method="ffsd", preset="code", branches=3, ramp_epochs=5, epochs=299, batch_size=128, lr=0.1,
                       lr_decay_at=(150 / 299, 225 / 299), lr_gamma=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, pad=4, padding="reflect",
                       flip=True)
