"""Recipes of FFM + CD (Li et al., ACCV 2020, section 4).

SGD with Nesterov momentum 0.9, learning rate 0.1 multiplied by 0.1 after 150 and 225 of 300 epochs (its text says iterations),
batches of 128, weight decay 5e-4, random crop with 4 pixels of zero padding and horizontal flip; four branches, T = 3, alpha = 1,
beta = 2, gamma = 5e-8. The ramp-up over 80 epochs is not in the paper, but in the code of OKDDip, whose settings it takes.
The paper gives means of three runs: train with seeds 0, 1 and 2.
"""

from fastokd.train.config import TrainConfig


def _settings(model: str) -> TrainConfig:
    return TrainConfig(method="ffm", model=model, branches=4, ramp_epochs=80, epochs=300, batch_size=128, lr=0.1, lr_decay_at=(150 / 300, 225 / 300),
                       lr_gamma=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, pad=4, flip=True)


def cifar10_resnet32_ffm() -> TrainConfig:
    """FFM + CD, ResNet-32 on CIFAR-10: 5.45 +- 0.07 % error of the leader."""
    return _settings("resnet32")


def cifar100_resnet32_ffm() -> TrainConfig:
    """FFM + CD, ResNet-32 on CIFAR-100: 24.84 +- 0.06 % error of the leader."""
    return _settings("resnet32")


def cifar100_resnet110_ffm() -> TrainConfig:
    """FFM + CD, ResNet-110 on CIFAR-100: 20.52 +- 0.13 % error of the leader."""
    return _settings("resnet110")
