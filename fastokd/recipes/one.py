"""Recipes of ONE's official code (Lan et al., NeurIPS 2018)."""

from fastokd.train.config import TrainConfig


def cifar100_resnet32_one() -> TrainConfig:
    """ONE's official code with ResNet-32 on CIFAR-100; its own paper's number is not at hand.

    Three branches, T = 3, weight 1 with a ramp-up over 80 epochs, 1e-7 on the teacher's row, which is detached (preset
    ``code``). SGD with momentum 0.9 without Nesterov, learning rate 0.1 multiplied by 0.1 after epochs 150 and 225 of 300,
    batches of 128, weight decay 1e-4 as in its scripts (its default is 5e-4), random crop with 4 pixels of zero padding and
    horizontal flip.
    """
    return TrainConfig(model="resnet32", method="one", preset="code", branches=3, ramp_epochs=80, epochs=300, batch_size=128, lr=0.1,
                       lr_decay_at=(150 / 300, 225 / 300), lr_gamma=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, pad=4, flip=True)
