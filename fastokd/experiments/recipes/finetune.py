"""Fine-tuning of a trained network on your own images.

Choices of ours, not tuned: replace network, split and epochs by yours (docs/fine-tuning.md).
"""

from fastokd.experiments.recipes.recipe import Recipe, by_name, given

_OURS = "ours, not tuned"

RECIPES = by_name(
    [
        Recipe(
            dataset="images",
            label="finetune",
            settings=given("torchvision's weights", model="torchvision:resnet18", pretrained=True)
            | given("ours: the last stage for each branch", at="layer4")
            | given("AHBF eq. 8-14: T = 3, lambda_1 = 4, lambda_2 = 2", method="ahbf")
            | given("ours: few, since each costs a stage", branches=3, aux_blocks=1)
            | given(_OURS, epochs=20, batch_size=64, schedule="cosine", warmup_epochs=1.0)
            | given(_OURS, optimizer="adamw", lr=1e-3, weight_decay=0.05)
            # As in Clark et al. 2020 (ELECTRA) and Bao et al. 2022 (BEiT), for transformers.
            | given("ours, after Clark et al. 2020", layer_decay=0.75)
            | given("He et al. 2019, section 3.1", decay="norm-bias-free")
            | given(_OURS, label_smoothing=0.1, auto_augment="trivialaugment"),
            notes=(
                "With --weights FILE instead of published weights, also pass --pretrained false.",
            ),
        )
    ]
)
