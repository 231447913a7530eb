"""CIFAR-10, CIFAR-100 and CINIC-10 in the settings that AHBF, OKDDip and FFM + CD share.

The three papers use the same setting, so one recipe lists the numbers of all three: AHBF (Gong et
al., AAAI 2023) Tables 1 and 2, OKDDip (Chen et al., AAAI 2020; the tables of its slides) and FFM +
CD (Li et al., ACCV 2020). The methods that AHBF and FFM + CD compare with are in the form of the
OKDDip repository, which has all of them; neither paper names the code that it ran. AHBF has the
paper's loss; its published code has another (``--preset code``). It is not known which of the two
losses produced the numbers. The seeds of the three runs are not given: train with seeds 0, 1 and 2.
"""

from collections.abc import Iterator

from fastokd.experiments.recipes.recipe import (
    CIFAR_AUGMENT,
    Published,
    Recipe,
    Settings,
    by_name,
    given,
    read_notes,
    read_table,
    steps,
)

_AHBF = "AHBF section 4.1"
_OKDDIP = "OKDDip repository"

OPTIMIZER = given(
    "AHBF section 4.1, OKDDip repository, FFM + CD section 4",
    **steps(300, 150, 225),
    **CIFAR_AUGMENT,
    batch_size=128,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
)
# Teachers are not detached in either preset: the paper is silent, its code does not.
AHBF = (
    given("AHBF eq. 8-14: T = 3, lambda_1 = 4, lambda_2 = 2", method="ahbf", preset="paper")
    | given(_AHBF, branches=4, aux_blocks=4)
    | given("AHBF eq. 13: over all epochs", ramp_epochs=None)
)

# None is the method's default: as large a part of the epochs as in its source, also with other
# --epochs.
_RAMP = given("OKDDip repository: over 80 of 300 epochs", ramp_epochs=None)
_FFM_RAMP = given(
    "OKDDip repository, whose settings FFM + CD takes: over 80 of 300 epochs", ramp_epochs=None
)
_OKDDIP_LOSS = (
    given("OKDDip repository: T = 3, weights 1", method="okddip", preset="code", branches=4) | _RAMP
)
_FFM_LOSS = (
    given("FFM + CD section 4: T = 3, alpha = 1, beta = 2, gamma = 5e-8", method="ffm", branches=4)
    | _FFM_RAMP
)

_ONE = "OKDDip repository: T = 3, weight 1, not detached"
_DML = "OKDDip repository: T = 3, the mean of the others teaches, not detached"
_AFID = "AFID's code: T = 3, weight 1, two sub-networks"
_METHODS: dict[str, Settings] = {
    "baseline": given("the network alone", method="baseline", branches=1),
    "independent": given(_OKDDIP, method="independent", branches=4),
    "kd": given("OKDDip repository: T = 3, weight 1", method="kd", preset="code", ramp_epochs=0),
    "dml": given(_DML, method="dml", preset="code", branches=4, ramp_epochs=0),
    "cl-ilr": given(_ONE, method="cl_ilr", preset="code", branches=4) | _RAMP,
    "one": given(_ONE, method="one", preset="code", branches=4)
    | given(_ONE, method_options={"detach_teacher": False})
    | _RAMP,
    "okddip": _OKDDIP_LOSS,
    "okddip-peers": _OKDDIP_LOSS | given("OKDDip, network-based", topology="peers"),
    "ffm": _FFM_LOSS,
    "ffm-no-cd": _FFM_LOSS | given("FFM + CD, ablation", method_options={"lambda_cd": 0.0}),
    "afid": given(_AFID, method="afid", preset="code", branches=2)
    | given("AFID's code: over 80 of 301 epochs", ramp_epochs=None),
    "ffsd": given("FFSD's code: T = 2", method="ffsd", preset="code")
    | given(_AHBF, branches=4)
    | given("FFSD's code: over 5 of 299 epochs", ramp_epochs=None),
    "ahbf": AHBF,
}
# What a name's ending adds to the method's own, in words.
_VARIANTS = {
    "okddip-peers": ("peers", "four whole networks"),
    "ffm-no-cd": ("no-cd", "without classifier diversity"),
}
# OKDDip reports these by the mean over branches or networks, and FFM + CD follows; AHBF reports
# branch 1 (section 4.1).
_MEANS = {"independent", "dml", "cl-ilr", "one"}

_AHBF_METHODS = ("baseline", "cl-ilr", "one", "okddip", "afid", "ffsd", "ahbf")
_OKDDIP_METHODS = ("baseline", "independent", "dml", "cl-ilr", "one", "okddip-peers", "okddip")

# Error in % and its standard deviation, for each method in turn.
_AHBF_TABLE_1 = """
resnet32          6.31 0.07   6.01 0.09   5.99 0.05   5.58 0.08   5.83 0.07   5.49 0.10   5.32 0.11
resnet110         5.58 0.09   4.95 0.17   5.17 0.07   4.56 0.11   5.02 0.11   4.48 0.10   4.33 0.08
vgg16             6.22 0.11   6.15 0.12   6.16 0.08   5.87 0.03   5.98 0.13   5.92 0.16   5.60 0.11
densenet40_12     7.02 0.05   7.11 0.06   6.85 0.15   6.48 0.12   6.62 0.09   6.43 0.07   6.17 0.14
mobilenetv2_x0_5 14.35 0.23  14.12 0.15  14.01 0.05  13.85 0.17  14.05 0.15  13.77 0.14  13.64 0.21
"""
_AHBF_TABLE_2 = """
resnet32         28.72 0.19  27.67 0.46  27.44 0.05  25.63 0.14  25.95 0.05  25.50 0.10  25.19 0.16
resnet110        23.79 0.57  21.17 0.58  21.56 0.09  21.14 0.14  21.43 0.13  21.17 0.12  20.96 0.14
vgg16            25.68 0.19  25.67 0.08  25.62 0.11  25.15 0.19  25.23 0.08  25.11 0.14  24.92 0.12
densenet40_12    28.97 0.15  28.55 0.34  28.61 0.12  28.34 0.02  28.47 0.06  28.26 0.08  27.88 0.23
mobilenetv2_x0_5 40.21 0.11  39.37 0.17  39.16 0.16  38.29 0.12  38.91 0.17  38.12 0.11  37.77 0.14
"""
_OKDDIP_CIFAR10 = """
densenet40_12     6.87 0.02   6.97 0.03   6.50 0.02   7.02 0.08   6.85 0.15   5.94 0.05   6.48 0.12
resnet32          6.34 0.03   5.99 0.15   6.18 0.05   6.06 0.07   5.94 0.06   5.62 0.07   5.58 0.08
vgg16             6.12 0.15   6.03 0.01   5.94 0.04   6.22 0.10   6.16 0.08   5.88 0.04   5.87 0.03
resnet110         5.46 0.02   4.95 0.02   5.68 0.03   4.88 0.12   5.02 0.04   4.54 0.07   4.56 0.11
wrn20_8           5.27 0.06   5.35 0.02   5.04 0.08   5.12 0.16   5.29 0.02   4.84 0.07   5.06 0.04
"""
_OKDDIP_CIFAR100 = """
densenet40_12    28.97 0.23  29.20 0.09  26.64 0.17  28.61 0.12  28.76 0.18  26.10 0.03  28.34 0.02
resnet32         28.76 0.08  27.84 0.05  26.47 0.26  27.44 0.05  26.50 0.13  25.40 0.08  25.63 0.14
vgg16            26.19 0.12  25.81 0.18  25.33 0.03  25.62 0.11  25.63 0.03  24.88 0.06  25.15 0.19
resnet110        24.12 0.20  23.54 0.15  22.50 0.11  21.56 0.09  21.67 0.12  21.09 0.17  21.14 0.14
wrn20_8          22.50 0.44  21.85 0.12  20.21 0.11  20.44 0.13  21.19 0.12  19.63 0.07  20.06 0.05
"""
_FFM_CIFAR10 = """
resnet32           6.38 0.10  5.45 0.07
resnet110          5.46 0.02  4.47 0.02
resnext50_32x4d    5.05 0.12  4.66 0.05
xception           5.70 0.08  5.19 0.05
shufflenetv2_x1_0  9.21 0.04  8.36 0.03
"""
_FFM_CIFAR100 = """
resnet32          28.39 0.04  25.76 0.04  25.45 0.10  24.84 0.06
resnet110         23.85 0.17  21.94 0.13  21.01 0.16  20.52 0.13
resnext50_32x4d   20.43 0.19  18.24 0.03  17.90 0.06  17.55 0.06
xception          21.71 0.06  19.69 0.06  19.66 0.07  19.55 0.11
shufflenetv2_x1_0 28.76 0.12  25.23 0.11  25.28 0.18  25.17 0.10
"""
_FFM_CINIC10 = """
resnet32          15.96 0.13  14.60 0.09  14.41 0.10  14.28 0.12
resnet110         13.99 0.06  12.29 0.09  12.21 0.11  11.86 0.08
resnext50_32x4d   13.65 0.12  12.19 0.04  12.20 0.06  12.02 0.07
"""
_TABLES = (
    ("AHBF Table 1", "cifar10", _AHBF_METHODS, _AHBF_TABLE_1),
    ("AHBF Table 2", "cifar100", _AHBF_METHODS, _AHBF_TABLE_2),
    ("OKDDip slides", "cifar10", _OKDDIP_METHODS, _OKDDIP_CIFAR10),
    ("OKDDip slides", "cifar100", _OKDDIP_METHODS, _OKDDIP_CIFAR100),
    ("FFM + CD", "cifar10", ("baseline", "ffm"), _FFM_CIFAR10),
    ("FFM + CD", "cifar100", ("baseline", "one", "okddip", "ffm"), _FFM_CIFAR100),
    ("FFM + CD", "cinic10", ("baseline", "one", "okddip", "ffm"), _FFM_CINIC10),
)


def _read() -> Iterator[tuple[tuple[str, str, str], Published]]:
    for source, dataset, methods, text in _TABLES:
        for model, numbers in read_table(text).items():
            for method, error, std in zip(methods, numbers[::2], numbers[1::2], strict=True):
                mean = method in _MEANS and not source.startswith("AHBF")
                row = "branch_mean" if mean else "student"
                yield (dataset, model, method), Published(source, error, std, 3, row)
    # Table 4's best cell, its words in Figure 3, and what Table 5 repeats of Table 2.
    yield ("cifar100", "resnet32", "ahbf"), Published("AHBF Table 4", 25.19)
    yield ("cifar100", "resnet32", "ahbf"), Published("AHBF Figure 3", 25.19)
    for model, alone, one in (("resnet32", 28.72, 27.44), ("mobilenetv2_x0_5", 40.21, 39.16)):
        yield ("cifar100", model, "baseline"), Published("AHBF Table 5", alone)
        yield ("cifar100", model, "one"), Published("AHBF Table 5", one)
    yield ("cifar100", "resnet32", "ffm-no-cd"), Published("FFM + CD, ablation", 25.40)


_NOTES = """
[*/kd]
Name the trained teacher: --method-options teacher=RUN. No paper reports this recipe.
[cifar100/resnet32/one cifar100/resnet110/one cifar100/vgg16/one cifar100/densenet40_12/one]
AHBF Table 2 lists OKDDip's CL-ILR numbers in the column ONE.
[*/afid]
AHBF does not state its AFID settings; this recipe uses AFID's loss and two sub-networks in AHBF's
setting.
[*/ffsd]
AHBF does not define its FFSD-C; this recipe trains three students and a leader (exported) with the
loss of FFSD's code.
[*/resnet32/baseline]
AHBF's published code builds the baseline with 5, 4 and 5 blocks; fastokd uses the student's 5, 5
and 5.
[*/mobilenetv2_x0_5/ahbf]
In AHBF's published code the branches share blocks that are separate in the paper, so only the last
is deeper; in fastokd all are.
[*/vgg16/*]
Dropout is 0.5 in every network, as in the published multi-branch networks; the published baseline
and peers have no dropout.
[*/densenet40_12/independent */densenet40_12/cl-ilr */densenet40_12/one */densenet40_12/okddip]
In the OKDDip repository all branches share one third dense block, and its numbers are probably from
this network; in fastokd each branch has a separate block.
"""


def _recipes() -> Iterator[Recipe]:
    numbers: dict[tuple[str, str, str], list[Published]] = {("cifar100", "resnet32", "kd"): []}
    for key, number in _read():
        numbers.setdefault(key, []).append(number)
    for (dataset, model, method), published in sorted(numbers.items()):
        variant, meaning = _VARIANTS.get(method, ("", ""))
        network = given("the table's row" if published else _OKDDIP, model=model)
        yield Recipe(
            dataset=dataset,
            settings=network | _METHODS[method] | OPTIMIZER,
            variant=variant,
            meaning=meaning,
            published=tuple(published),
            notes=read_notes(_NOTES, f"{dataset}/{model}/{method}"),
        )


RECIPES = by_name(_recipes())
