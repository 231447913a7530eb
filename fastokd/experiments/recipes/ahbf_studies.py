"""AHBF's ablations and compressed networks on CIFAR-100 (Tables 4 and 5, Figure 3).

Each recipe changes one setting of ResNet-32 on CIFAR-100 (section 4.1); the two of Table 5 train
networks of which the largest is the plain one. Of Figure 3 only the values in the text are known;
the other points (M from 2 to 6, a from 0 to 5) are recipes without a number. The ablations of the
components are rows of Table 4: ``lambda-2-0`` has only the teacher assistants' term, ``lambda-0-3``
only the branches' term, ``lambda-0-0`` neither, and ``a-0`` has equal branches. To reproduce the
study of ramp-ups between E = 80 and 300, change ``--ramp-epochs``.
"""

from collections.abc import Iterator

from fastokd.experiments.recipes.cifar import AHBF, OPTIMIZER
from fastokd.experiments.recipes.recipe import Published, Recipe, Sourced, by_name, given

# Error in % for lambda_2 = 0 to 4, a row for each lambda_1.
_TABLE_4 = (
    (28.88, 27.19, 26.88, 26.59, 26.76),
    (27.04, 25.77, 25.98, 26.23, 26.30),
    (26.32, 25.61, 25.66, 25.48, 25.37),
    (26.76, 25.48, 25.66, 25.39, 25.54),
    (26.78, 25.45, 25.19, 25.45, 25.98),
)
# Figure 3 (d), by (lambda_1, lambda_2): neither term, the best with the TAs' term alone, the best
# with the branches' alone.
_FIGURE_3D = {(0, 0): 28.98, (2, 0): 26.32, (0, 3): 26.59}
# The ablation of components: whether lambda_1 and lambda_2 are above 0.
_COMPONENTS = {
    (False, False): ": no distillation from teacher assistants",
    (True, False): ": the teacher assistants' term alone",
    (False, True): ": the branches' term alone",
}
# Table 5: the network, a, and the errors of branches 1 to 4; the 4th is the plain network and is
# kept.
_TABLE_5 = (
    ("resnet32", 2, (31.48, 28.18, 27.36, 26.57)),
    ("mobilenetv2_x0_5", 1, (41.4, 40.12, 39.12, 38.24)),
)


def _study(
    variant: str, meaning: str, changes: dict[str, Sourced], *published: Published
) -> Recipe:
    settings = given("AHBF Table 4 and Figure 3", model="resnet32") | AHBF | OPTIMIZER | changes
    return Recipe(
        dataset="cifar100", settings=settings, variant=variant, meaning=meaning, published=published
    )


def _recipes() -> Iterator[Recipe]:
    figure = "AHBF Figure 3"
    for lambda_1, row in enumerate(_TABLE_4):
        for lambda_2, error in enumerate(row):
            if (lambda_1, lambda_2) == (4, 2):
                continue  # that is the recipe itself
            options = {"lambda_ta": float(lambda_1), "lambda_branch": float(lambda_2)}
            numbers = [Published("AHBF Table 4", error)]
            if (lambda_1, lambda_2) in _FIGURE_3D:
                numbers.append(Published(figure, _FIGURE_3D[lambda_1, lambda_2]))
            only = _COMPONENTS.get((bool(lambda_1), bool(lambda_2)), "")
            meaning = f"lambda_1 = {lambda_1}, lambda_2 = {lambda_2}{only}"
            changes = given("AHBF Table 4", method_options=options)
            yield _study(f"lambda-{lambda_1}-{lambda_2}", meaning, changes, *numbers)
    equal = Published(figure, 26.47)
    yield _study("a-0", "a = 0: equal branches", given(figure, aux_blocks=0), equal)
    for aux_blocks in (1, 2, 3, 5):
        changes = given(figure, aux_blocks=aux_blocks)
        yield _study(f"a-{aux_blocks}", f"a = {aux_blocks}", changes)
    for branches in (2, 3, 5, 6):
        yield _study(f"m-{branches}", f"M = {branches}", given(figure, branches=branches))
    yield _study("e-80", "E = 80", given(figure, ramp_epochs=80), Published(figure, 26.21))
    for model, aux_blocks, errors in _TABLE_5:
        rows = ("branch1", "branch2", "branch3", "student")
        network = given("AHBF Table 5", model=model, aux_blocks=aux_blocks, compression=True)
        yield Recipe(
            dataset="cifar100",
            variant="compression",
            meaning="the plain network with three smaller ones",
            settings=AHBF | OPTIMIZER | network,
            published=tuple(
                Published("AHBF Table 5", error, row=row)
                for row, error in zip(rows, errors, strict=True)
            ),
            notes=(
                "The table's FLOPs and parameters match no network that we could derive from paper"
                " or code; the networks follow the code.",
            ),
        )


RECIPES = by_name(_recipes())
