"""ONE, FFSD and AFID in the settings of the methods' published code.

These differ from the settings of the papers that compare with them. The suffix ``-official`` marks
these recipes.
"""

from collections.abc import Iterator

from fastokd.experiments.recipes.recipe import (
    CIFAR_AUGMENT,
    Published,
    Recipe,
    Settings,
    by_name,
    given,
    steps,
)

_ONE = (
    given("ONE's code", method="one", preset="code", branches=3, batch_size=128, lr=0.1)
    | given("ONE's code", **steps(300, 150, 225), momentum=0.9, nesterov=False, **CIFAR_AUGMENT)
    | given("ONE's code: over 80 of 300 epochs", ramp_epochs=None)
    | given("ONE's scripts; its code's default is 5e-4", weight_decay=1e-4)
)
# Two students and a leader. The decoders' Adam at 1e-3 and the fusion head's weight decay of 1e-5
# are the method's defaults.
_FFSD = given("FFSD's code", method="ffsd", preset="code", branches=3) | given(
    "FFSD's code", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
)
_FFSD_EPOCHS = "FFSD's code, which counts epochs from 1"
_FFSD_CIFAR = (
    _FFSD
    | given(_FFSD_EPOCHS, **steps(299, 150, 225))
    | given("FFSD's code", lr_gamma=0.1, batch_size=128, padding="reflect", **CIFAR_AUGMENT)
    | given("FFSD's code: over 5 of 299 epochs", ramp_epochs=None)
)
_FFSD_IMAGENET = (
    _FFSD
    | given(_FFSD_EPOCHS, **steps(89, 30, 60, 80))
    | given("FFSD's code", lr_gamma=0.1, batch_size=256, warmup_epochs=5.0, ramp_epochs=5)
)
# The fusion head's weight decay of 1e-5 is the method's default.
_AFID = given("AFID's code", method="afid", preset="code", branches=2, momentum=0.9)
_AFID_CIFAR = (
    _AFID
    | given("AFID's code", **steps(301, 150, 225), **CIFAR_AUGMENT)
    | given("AFID's code", batch_size=128, nesterov=True, weight_decay=2e-4)
    | given("AFID's code: over 80 of 301 epochs", ramp_epochs=None)
    | given("AFID's code; its readme has 0.2", lr=0.1)
)
_AFID_IMAGENET = (
    _AFID
    | given("AFID's code", **steps(100, 30, 60, 90), ramp_epochs=80)
    | given("AFID's code", batch_size=256, lr=0.1, nesterov=False, weight_decay=1e-4)
)

_README = "FFSD's readme"
_UNKNOWN = ("We do not have the number of the method's paper.",)
# Dataset, network, its source, settings, the published number (that of ResNet-32 is of 74.92, 74.82
# and 74.82 % accuracy).
_ROWS: tuple[tuple[str, str, str, Settings, Published | None], ...] = (
    ("cifar100", "resnet32", "ONE's code", _ONE, None),
    ("cifar100", "resnet32", _README, _FFSD_CIFAR, Published(_README, 25.15, 0.06, 3)),
    ("imagenet", "resnet18_imagenet", _README, _FFSD_IMAGENET, Published(_README, 29.13)),
    ("imagenet", "resnet34_imagenet", _README, _FFSD_IMAGENET, Published(_README, 25.31)),
    ("cifar100", "wrn16_2", "AFID's code", _AFID_CIFAR, None),
    ("imagenet", "resnet18_imagenet", "AFID's code", _AFID_IMAGENET, None),
    ("imagenet", "resnet34_imagenet", "AFID's code", _AFID_IMAGENET, None),
)


def _recipes() -> Iterator[Recipe]:
    for dataset, model, source, settings, number in _ROWS:
        yield Recipe(
            dataset=dataset,
            settings=given(source, model=model) | settings,
            variant="official",
            meaning="in the settings of the method's code",
            published=(number,) if number else (),
            notes=() if number else _UNKNOWN,
        )


RECIPES = by_name(_recipes())
