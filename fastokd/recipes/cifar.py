"""Recipes for CIFAR-10 and CIFAR-100.

All follow the settings the AHBF paper gives for CIFAR (section 4.1): SGD with Nesterov momentum 0.9, learning rate 0.1
multiplied by 0.1 after epochs 150 and 225 of 300, batches of 128, weight decay 5e-4, random crop with 4 pixels of zero
padding and horizontal flip. The paper gives means of three runs: train with seeds 0, 1 and 2.
"""

from fastokd.train.config import TrainConfig

_PAPER = {
    "epochs": 300, "batch_size": 128, "lr": 0.1, "lr_decay_at": (150 / 300, 225 / 300), "lr_gamma": 0.1,
    "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "pad": 4, "flip": True,
}


def cifar10_resnet32_ahbf() -> TrainConfig:
    """AHBF Table 1, ResNet-32 on CIFAR-10: 5.32 +- 0.11 % error.

    M = 4 branches, a = 4 auxiliary blocks a level, temperature 3, lambda_1 = 4, lambda_2 = 2, ramp-up over all 300
    epochs (section 4.1, eq. 13 and 14). Teachers are not detached: the paper is silent, its code does not.
    """
    return TrainConfig(model="resnet32", method="ahbf", preset="paper", branches=4, aux_blocks=4, ramp_epochs=None, **_PAPER)


def cifar100_resnet32_ahbf() -> TrainConfig:
    """AHBF Table 2, ResNet-32 on CIFAR-100: 25.19 +- 0.16 % error.

    The settings of ``cifar10-resnet32-ahbf``; the classes come from the data.
    """
    return cifar10_resnet32_ahbf()


def cifar10_resnet20_baseline() -> TrainConfig:
    """ResNet-20 alone on CIFAR-10; TSB Table 1 reports 91.89 % accuracy (8.11 % error) for its own recipe.

    The optimizer settings are those of the AHBF paper, so that it compares with the AHBF recipes here; TSB trains 240
    epochs from 0.05 in batches of 64.
    """
    return TrainConfig(model="resnet20", method="baseline", preset="paper", branches=1, aux_blocks=0, **_PAPER)
