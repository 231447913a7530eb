"""Recipes of the OKDDip repository (Chen et al., AAAI 2020), which also holds Ind, KD, DML, CL-ILR and a ONE.

All share its settings for CIFAR: SGD with Nesterov momentum 0.9, learning rate 0.1 multiplied by 0.1 after epochs 150 and
225 of 300, batches of 128, weight decay 5e-4, random crop with 4 pixels of zero padding and horizontal flip, four branches.
The paper gives means of three runs: train with seeds 0, 1 and 2.
"""

from typing import Any

from fastokd.train.config import TrainConfig


def _settings(method: str, **changes: Any) -> TrainConfig:
    return TrainConfig(method=method, model="resnet32", branches=4, epochs=300, batch_size=128, lr=0.1, lr_decay_at=(150 / 300, 225 / 300),
                       lr_gamma=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, pad=4, flip=True, **changes)


def cifar100_resnet32_okddip() -> TrainConfig:
    """OKDDip slides, ResNet-32 on CIFAR-100, branch-based: 25.63 +- 0.14 % error of the leader.

    The published code's loss (preset ``code``): three peers and the leader on one trunk, T = 3, both levels weighed 1 with a
    ramp-up over 80 epochs.
    """
    return _settings("okddip", preset="code", ramp_epochs=80)


def cifar100_resnet32_okddip_peers() -> TrainConfig:
    """OKDDip slides, ResNet-32 on CIFAR-100, network-based: 25.40 +- 0.08 % error of the leader.

    As ``cifar100-resnet32-okddip``, with four whole networks.
    """
    return _settings("okddip", preset="code", ramp_epochs=80, topology="peers")


def cifar100_resnet32_dml() -> TrainConfig:
    """OKDDip slides, DML with four ResNet-32 on CIFAR-100: 26.47 +- 0.26 % error, the mean over the networks.

    The repository's form (preset ``code``): the mean of the other networks' logits teaches, T = 3, nothing detached, no
    ramp-up.
    """
    return _settings("dml", preset="code", ramp_epochs=0)


def cifar100_resnet32_cl_ilr() -> TrainConfig:
    """OKDDip slides, CL-ILR with ResNet-32 on CIFAR-100: 27.44 +- 0.05 % error, the mean over the heads.

    The repository's form (preset ``code``): T = 3, weight 1 with a ramp-up over 80 epochs, the trunk's gradient divided
    by 4.
    """
    return _settings("cl_ilr", preset="code", ramp_epochs=80)


def cifar100_resnet32_one_attached() -> TrainConfig:
    """OKDDip slides, ONE with four branches, ResNet-32 on CIFAR-100: 26.50 +- 0.13 % error, the mean over the branches.

    ONE as the OKDDip repository has it: T = 3, weight 1 with a ramp-up over 80 epochs, 1e-7 on the teacher's row, the
    teacher not detached. For the official form see ``cifar100-resnet32-one``.
    """
    return _settings("one", preset="code", ramp_epochs=80, method_options={"detach_teacher": False})


def cifar100_resnet32_independent() -> TrainConfig:
    """OKDDip slides, Ind with ResNet-32 on CIFAR-100: 27.84 +- 0.05 % error, the mean over the branches.

    Four branches on one trunk, cross-entropies alone.
    """
    return _settings("independent")
