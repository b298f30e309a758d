"""Named recipes: functions that return a checked recipe, each with a `quick` twin that tests run for a few steps."""

from __future__ import annotations

from collections.abc import Callable

from anybatch.recipe import Data, Model, Optim, Recipe, Schedule, Train
from anybatch.suggest import unknown


def digits() -> Recipe:
    """Handwritten digits under varying exposure: a narrow ResNet-8 on 512 images of 8 x 8, ten seconds on one core."""
    return Recipe(
        model=Model(name="resnet8", options={"width": 32, "zero_init_residual": True}),
        data=Data(name="digits", train_size=512),
        optim=Optim(lr=0.2),
        schedule=Schedule(epochs=10),
    )


def fashion_mnist() -> Recipe:
    """Fashion-MNIST: a narrow ResNet-8 on 4,000 images for 5 epochs, a minute or two on one core."""
    return Recipe(
        model=Model(name="resnet8", options={"width": 32}),
        data=Data(name="fashion-mnist", train_size=4000, val_size=4000),
        optim=Optim(lr=0.2),
        schedule=Schedule(epochs=5),
    )


def cifar10() -> Recipe:
    """CIFAR-10: a ResNet-20 of width 32 with crops and flips for 30 epochs, for a GPU or a patient CPU."""
    return Recipe(
        model=Model(name="resnet20", options={"width": 32}),
        data=Data(name="cifar10", augment=("crop", "flip"), batch_size=32),
        optim=Optim(lr=0.1),
        schedule=Schedule(epochs=30, warmup=1),
    )


def images() -> Recipe:
    """Folders of images, or arrays: a ResNet-14 of width 32 at 64 pixels with crops and flips for 15 epochs."""
    return Recipe(
        model=Model(name="resnet14", options={"width": 32}),
        data=Data(name="imagefolder", augment=("crop", "flip"), batch_size=8),
        optim=Optim(lr=0.1),
        schedule=Schedule(epochs=15, warmup=1),
    )


def arrays() -> Recipe:
    """Images in an .npz file: a ResNet-8 of width 32 for 8 epochs, no augmentation."""
    return Recipe(
        model=Model(name="resnet8", options={"width": 32}), data=Data(name="arrays", batch_size=8), optim=Optim(lr=0.1)
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagefolder": images,
    "arrays": arrays,
}


def named(name: str) -> Recipe:
    """The recipe of that name; ``NAME-quick`` is its twin for tests."""
    base = name.removesuffix("-quick")
    if base not in RECIPES:
        raise unknown("recipe", name, [*RECIPES, *(f"{known}-quick" for known in RECIPES)])
    recipe = RECIPES[base]()
    return recipe if base == name else quick(recipe)


def quick(recipe: Recipe) -> Recipe:
    """The same recipe on 64 images for 2 epochs: it shows that everything fits together, not how well it learns."""
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train_size": 64, "val_size": 64}),
            "schedule": recipe.schedule.model_copy(update={"epochs": 2, "warmup": 0.5}),
            "train": Train(seed=recipe.train.seed),
        }
    )
