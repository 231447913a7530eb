"""ImageNet with today's training recipes, for AHBF and the network alone.

The settings of torchvision's second ResNet-50 weights (Vryniotis 2021, "How to Train State-Of-The-
Art Models Using TorchVision's Latest Primitives") and of the short schedule A3 of timm (Wightman,
Touvron and Jegou 2021, "ResNet strikes back", arXiv 2110.00476) were made for networks alone; with
branches they are not published and not tuned.
"""

from collections.abc import Iterator

from fastokd.experiments.recipes.recipe import Recipe, Settings, by_name, given, read_notes

_METHODS: dict[str, Settings] = {
    "baseline": given("the network alone", method="baseline", branches=1),
    "ahbf": given("AHBF eq. 8-14: T = 3, lambda_1 = 4, lambda_2 = 2", method="ahbf", preset="paper")
    | given("AHBF section 4.1", branches=4, aux_blocks=2),
}
_V2 = "torchvision's ResNet-50 V2 recipe"
_MODERN = (
    given(_V2, epochs=600, batch_size=1024, lr=0.5, momentum=0.9, nesterov=False)
    | given(_V2, schedule="cosine", warmup_epochs=5.0, weight_decay=2e-5, label_smoothing=0.1)
    | given(_V2, auto_augment="trivialaugment", random_erasing=0.1, mixup=0.2, cutmix=1.0)
    | given(f"{_V2}: train-crop-size 176", resize_schedule={0: 176})
    | given(f"{_V2}: norms alone", decay="norm-bias-free")
    # torchvision moves the average every 32 steps by (1 - 0.99998) * 1024 * 32 / 600 of the way.
    | given(f"{_V2}: 0.9989 every 32 steps", ema=0.999966)
    | given("ours: JPEGs decoded on the GPUs", loader="dali")
)
_STRIKES = "ResNet strikes back, table 2, A3"
_A3 = (
    given(_STRIKES, epochs=100, batch_size=2048, schedule="cosine", warmup_epochs=5.0)
    | given(_STRIKES, weight_decay=0.02, mixup=0.1, cutmix=1.0, label_smoothing=0.0)
    | given(f"{_STRIKES}: 160 pixels", resize_schedule={0: 160})
    | given(f"{_STRIKES}: rand-m6", auto_augment="randaugment")
    # timm's magnitudes are of 10, torchvision's of 30.
    | given(f"{_STRIKES}: rand-m6", auto_augment_options={"magnitude": 18})
    | given("timm: norms and biases are not decayed", decay="norm-bias-free")
    | given("ours, not tuned: AdamW instead of LAMB", optimizer="adamw", lr=2e-3)
    | given("ours: JPEGs decoded on the GPUs", loader="dali")
)
_NOTES = """
[modern/*]
torchvision also trains each epoch on a quarter of the images, each augmented in four ways
(repeated augmentation), which fastokd does not do.
[modern/*]
torchvision decays biases; here neither norms nor biases are decayed.
[a3/*]
The source trains with LAMB (learning rate 0.008) and a binary cross-entropy of each class; here it
is AdamW and the cross-entropy over all classes.
[a3/*]
timm varies the magnitude of RandAugment randomly (mstd0.5) and increases it with severity (inc1);
torchvision's has one magnitude.
[modern/*]
torchvision scales the shorter side of evaluation images to 232 before the crop of 224 (the
transforms of the published weights); here it is 256.
[a3/*]
timm scales evaluation images to 235 before the crop of 224 (crop ratio 0.95); here it is 256.
[a3/ahbf modern/ahbf]
Made for the network alone; with branches neither published nor tuned.
"""


def _recipes() -> Iterator[Recipe]:
    for variant, model, recipe, meaning in (
        ("modern", "resnet50_imagenet", _MODERN, "torchvision's current recipe"),
        ("a3", "resnet18_imagenet", _A3, "the short schedule A3"),
    ):
        for method, settings in _METHODS.items():
            yield Recipe(
                dataset="imagenet",
                settings=given("ours", model=model) | settings | recipe,
                variant=variant,
                meaning=meaning,
                notes=read_notes(_NOTES, f"{variant}/{method}"),
            )


RECIPES = by_name(_recipes())
