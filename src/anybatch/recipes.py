"""Named recipes: functions that return a checked recipe, each with a `quick` twin that tests run for a few steps.

Those that were published quote what was published and say how they differ. All on ImageNet differ in the images:
`imagefolder` keeps the central square of each image, 8/7 as high as the training images, of which a part is cropped at
random; the publications crop from whole images. It evaluates on the central square at its full height, where they, if
nothing else is said, resize to 256 and keep the central 224 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anybatch.recipe import Data, Model, Optim, Privacy, Recipe, Schedule, Train
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


def cifar100() -> Recipe:
    """CIFAR-100: as cifar10, with 100 classes."""
    return cifar10().replace({"data.name": "cifar100"})


# Published recipes.


def gn_imagenet() -> Recipe:
    """ResNet-50 with Group Norm on ImageNet (folders train and val), 8 GPUs x 32 images, 100 epochs.

    Published: error 24.1 % (BN: 23.6 %) at 32 images a GPU, 24.1 % (BN: 34.7 %) at 2; arXiv:1803.08494. Its hours are
    not known to us. The learning rate follows the images of a step, so that one GPU can take ``train.devices=1`` and
    ``data.accumulate=8``, with the same result up to rounding.

    Differs: the published error is the median of the last 5 epochs.
    """
    return Recipe(
        model=Model(name="resnet50", scheme="gn", options={"zero_init_residual": True}),
        data=_imagenet(batch_size=32),
        optim=Optim(lr=0.1, lr_batch=256, weight_decay=1e-4, decay_all=True),
        schedule=Schedule(name="step", epochs=100, warmup=0),
        train=Train(devices=8),
    )


def ws_bcn_imagenet() -> Recipe:
    """ResNet-50 with Weight Standardization and Batch-Channel Norm on ImageNet (folders train and val), 4 GPUs x 64.

    Its accuracy could not be confirmed. With GN in place of BCN the same recipe gives error 23.72 % as published with
    the code of arXiv:1903.10520. 90 epochs; its hours are not known to us. The channel statistics are each device's.
    """
    return Recipe(
        model=Model(
            name="resnet50", scheme="ws(variant=bcn)+bcn(statistics=batch)", options={"zero_init_residual": True}
        ),
        data=_imagenet(batch_size=64),
        optim=Optim(lr=0.1, lr_batch=256, weight_decay=1e-4, decay_all=True),
        schedule=Schedule(name="step", epochs=90, warmup=0, milestones=(1 / 3, 2 / 3)),
        train=Train(devices=4),
    )


def bit_finetune() -> Recipe:
    """Fine-tune BiT's ResNet-50 (GN + WS, its weights in BiT-M-R50x1.npz or as model.weights) on CIFAR-100, 1 GPU.

    BiT-HyperRule for 20,000 to 500,000 images: 10,000 steps of 512 images, here 103 epochs of CIFAR-100; fewer images
    take 500 steps and more take 20,000; arXiv:1912.11370, whose tables have the accuracy, which we could not confirm
    and do not quote. Its hours are not known to us.

    ``data.accumulate=8`` with ``data.batch_size=64`` needs an eighth of the memory, with the same
    result but for MixUp, which then draws a ratio for each 64.

    Differs: images of 128 pixels are shifted by up to 16, with reflected borders, where the release crops 128 of 160;
    the new classifier starts from the network's own initialization, there from 0; MixUp draws one ratio for a batch,
    as there.
    """
    return Recipe(
        model=Model(
            name="preact_resnet50",
            scheme="ws(variant=bit)+gn",
            options={"stem": "bit"},
            weights="BiT-M-R50x1.npz",
        ),
        data=Data(
            name="cifar100", size=128, augment=("crop", "flip"), mixup=0.1, normalize="symmetric", batch_size=512
        ),
        optim=Optim(lr=0.003, lr_batch=512, weight_decay=0),
        schedule=Schedule(name="step", epochs=103, warmup=500 / 97),
    )


KN_LR = {2: 0.0015625, 32: 0.05, 256: 0.2}
"""Learning rates of KNResNet-18 and 34 on CIFAR-100 by batch size; KNResNet-50 has 0.025 at 32."""


def kn_cifar100(batch_size: int = 32) -> Recipe:
    """KNResNet-18 on CIFAR-100, batch 32, 150 epochs, 1 GPU; kn-cifar100-b2 and kn-cifar100-b256 for other batches.

    Published: accuracy 79.10 %, 79.29 % and 78.84 % at batch 2, 32 and 256 (BN: 72.11 %, 78.52 %, 77.72 %), means of 3
    runs; arXiv:2205.10089, table 1. Its hours are not known to us.

    The learning rate of each batch size was searched for, so that it follows no rule: with another ``data.batch_size``
    set ``optim.lr`` too. KNResNet-34 takes the same; KNResNet-50 0.025 at batch 32.

    Differs: random crops have reflected borders, there black ones; dropout is off in evaluation, there it is left on.
    """
    return Recipe(
        model=Model(name="knresnet18", scheme="kn(eps=1e-5)", options={"stem": "cifar"}),
        data=Data(name="cifar100", augment=("crop", "flip"), normalize="unit", batch_size=batch_size),
        optim=Optim(lr=KN_LR[batch_size], lr_batch=batch_size, lr_scaling="none", weight_decay=5e-4, decay_all=True),
        schedule=Schedule(epochs=150, warmup=0, floor=0.01),
    )


def kn_cifar100_b2() -> Recipe:
    """As kn-cifar100, with batch 2 and its learning rate.

    Published: accuracy 79.10 % (BN: 72.11 %), mean of 3 runs; arXiv:2205.10089, table 1. Its hours are not known to us.
    """
    return kn_cifar100(2)


def kn_cifar100_b256() -> Recipe:
    """As kn-cifar100, with batch 256 and its learning rate.

    Published: accuracy 78.84 % (BN: 77.72 %), mean of 3 runs; arXiv:2205.10089, table 1. Its hours are not known to us.
    """
    return kn_cifar100(256)


def kn_imagenet() -> Recipe:
    """KNResNet-18 on ImageNet (folders train and val), 8 GPUs x 32 images, 100 epochs.

    Published: accuracy 71.17 % (GN: 68.93 %, BN: 70.28 %), KNResNet-34 74.60 % and -50 76.54 %, one run each;
    arXiv:2205.10089, table 2. Its hours are not known to us.

    Differs: dropout is off in evaluation, there it is left on.
    """
    return Recipe(
        model=Model(name="knresnet18", scheme="kn(eps=1e-5)"),
        data=_imagenet(batch_size=32),
        optim=Optim(lr=0.1, lr_batch=256, weight_decay=1e-4, decay_all=True),
        schedule=Schedule(name="step", epochs=100, warmup=0),
        train=Train(devices=8),
    )


def nf_resnet_agc() -> Recipe:
    """NF-ResNet-50 with adaptive gradient clipping on ImageNet (folders train and val), 8 devices x 128, 90 epochs.

    Published, as a figure only: as good as BN or better from batch 256 to 4096, where it falls behind without clipping;
    arXiv:2102.06171, section 4.1. Its hours are not known to us. The learning rate is 0.1 at 256 images a step and
    follows their number: set ``data.batch_size`` or ``train.devices``, and ``model.scheme`` without ``+agc`` for the
    other arm.

    Not stated there, and taken from the earlier work on these networks (arXiv:2101.08692): weight decay 5e-5, dropout
    0.25, stochastic depth 0.1; from the released code: label smoothing 0.1, 5 epochs of warm-up.
    """
    return Recipe(
        model=Model(
            name="nf_resnet50",
            scheme="nf(skip_gain=0,released=True)+agc",
            options={"drop_rate": 0.25, "drop_path_rate": 0.1},
        ),
        data=_imagenet(batch_size=128),
        optim=Optim(lr=0.1, lr_batch=256, nesterov=True, weight_decay=5e-5),
        schedule=Schedule(epochs=90, warmup=5),
        train=Train(devices=8, label_smoothing=0.1),
    )


def nfnet_f_imagenet() -> Recipe:
    """NFNet-F0 on ImageNet (folders train and val), 4,096 images a step, here of 32 devices x 128, 360 epochs.

    Published: accuracy 83.6 % at 256 pixels, trained at 192, and 73 ms a step of 1,024 images on 32 cores of TPUv3;
    F1 84.7 %, F2 85.1 %, F3 85.7 %, F4 85.9 %, F5 86.0 %; arXiv:2102.06171, tables 1 and 3. Its hours are not known
    to us. Batch size x accumulation x devices may be split otherwise.

    Larger networks, by level from F1: ``model.options.drop_rate`` 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5; ``data.size`` and
    ``data.eval_size`` as ``train_size`` and ``size`` in ``anybatch list --models``; RandAugment 10, 10, then 15 of 10.

    Differs: RandAugment comes before the mixing, there behind it, with torchvision's operations, and its strength 5 of
    10 is 15 of torchvision's 30, which ends at 10 of 10; MixUp and CutMix each draw one ratio for their half of a
    device's batch and mix within it, there for each image, with another one; images are resized bilinearly, there
    bicubically; evaluation keeps the central square, there the whole image is squeezed into one and 32 pixels are cut
    off; mean and variance are those of the training images.
    """
    return Recipe(
        model=Model(
            name="nfnet_f0",
            scheme="nf(act=gelu_tanh,skip_gain=0,released=True)+agc",
            options={"drop_rate": 0.2, "drop_path_rate": 0.25},
        ),
        data=_imagenet(
            size=192,
            eval_size=256,
            augment=("crop", "flip", "randaugment"),
            randaugment_layers=4,
            randaugment_magnitude=15,
            mixup=0.2,
            cutmix=1.0,
            batch_size=128,
        ),
        optim=Optim(lr=0.1, lr_batch=256, nesterov=True, weight_decay=2e-5),
        schedule=Schedule(epochs=360, warmup=5),
        train=Train(devices=32, precision="bf16-mixed", label_smoothing=0.1, ema=0.99999, ema_warmup=True),
    )


def nfnet_f_sam_imagenet() -> Recipe:
    """NFNet-F5 on ImageNet (folders train and val) with sharpness-aware minimization; else as nfnet-f-imagenet.

    Published: accuracy 86.3 % at 544 pixels, trained at 416 (86.0 % without), and F6 86.5 %; arXiv:2102.06171, table 3.
    Its hours are not known to us.

    Differs, beside what nfnet-f-imagenet names: the first gradient is that of the whole batch, there of a fifth of it,
    so that a step costs twice a plain one, there 1.2 to 1.4 times; it is averaged over all devices, there each moves by
    its own. The radius is not published for ImageNet: 0.05 is that of the published fine-tuning. RandAugment's strength
    is 30 of torchvision's 30, where 15 of 10 was published.
    """
    return nfnet_f_imagenet().replace(
        {
            "model.name": "nfnet_f5",
            "model.options.drop_rate": 0.5,
            "data.size": 416,
            "data.eval_size": 544,
            "data.randaugment_magnitude": 30,
            "optim.sam_rho": 0.05,
        }
    )


def dp_cifar10() -> Recipe:
    """KNResNet-13 on CIFAR-10 under differential privacy, epsilon 6 at delta 1e-5, 100 epochs, 1 GPU (anybatch[dp]).

    The example of the code released with arXiv:2210.00053, whose accuracy could not be confirmed. Its hours are not
    known to us. A step takes 4,096 images on average, here 128 at a time, each with gradients of its own: 1 GB for
    those; ``data.batch_size`` times ``data.accumulate`` may be split otherwise, with the same result.

    resnet8_kn and densenet20x16_kn are the other networks published with it, with act=mish too; the same settings were
    not published for them.

    Differs: each image is drawn with the same probability, by itself, as the account presumes; no augmentation, there
    optionally three views of each image; dropout is off in evaluation, there it is left on.
    """
    return Recipe(
        model=Model(name="knresnet13", scheme="kn(p=0.1,eps=1e-5,final_p=0.5)", options={"act": "mish"}),
        data=Data(name="cifar10", normalize="unit", batch_size=128, accumulate=32),
        optim=Optim(lr=2.0, lr_batch=4096, lr_scaling="none", momentum=0, weight_decay=0),
        schedule=Schedule(name="step", epochs=100, warmup=0, milestones=(0.5, 0.75), factor=0.5),
        privacy=Privacy(epsilon=6, delta=1e-5, max_grad_norm=1.5),
    )


def _imagenet(**changes: Any) -> Data:
    """Folders of ImageNet's images; its root is the user's to give."""
    return Data(**{"name": "imagefolder", "size": 224, "augment": ("crop", "flip"), "crop_area": 0.08, **changes})


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": images,
    "arrays": arrays,
    "gn-imagenet": gn_imagenet,
    "ws-bcn-imagenet": ws_bcn_imagenet,
    "bit-finetune": bit_finetune,
    "kn-cifar100": kn_cifar100,
    "kn-cifar100-b2": kn_cifar100_b2,
    "kn-cifar100-b256": kn_cifar100_b256,
    "kn-imagenet": kn_imagenet,
    "nf-resnet-agc": nf_resnet_agc,
    "nfnet-f-imagenet": nfnet_f_imagenet,
    "nfnet-f-sam-imagenet": nfnet_f_sam_imagenet,
    "dp-cifar10": dp_cifar10,
}

_SMALL: dict[str, Any] = {"data.size": 32, "data.batch_size": 8, "data.eval_batch_size": 32}
_NF_SMALL = {**_SMALL, "model.name": "nf_regnet_b0", "train.label_smoothing": 0.1}
_NFNET_SMALL = {**_NF_SMALL, "data.eval_size": 48, "train.ema": 0.99999, "train.ema_warmup": True}
_QUICK: dict[str, dict[str, Any]] = {
    "gn-imagenet": {**_SMALL, "model.name": "resnet18", "model.options.width": 32},
    "ws-bcn-imagenet": {**_SMALL, "model.name": "resnet18", "model.options.width": 32},
    "bit-finetune": {
        **_SMALL,
        "model.name": "preact_resnet18",
        "model.options.width": 32,
        "model.weights": None,
    },
    "kn-cifar100": {**_SMALL, "model.options.width": 8},
    "kn-cifar100-b2": {**_SMALL, "model.options.width": 8, "data.batch_size": 2},
    "kn-cifar100-b256": {**_SMALL, "model.options.width": 8},
    "kn-imagenet": {**_SMALL, "model.options.width": 8, "model.options.stem": "cifar"},
    "nf-resnet-agc": {**_NF_SMALL, "model.name": "nf_resnet26"},
    "nfnet-f-imagenet": _NFNET_SMALL,
    "nfnet-f-sam-imagenet": _NFNET_SMALL,
    "dp-cifar10": {**_SMALL, "model.options.width": 8, "data.accumulate": 2, "privacy.seeded": True},
}
"""What the quick twin of a published recipe has, for seconds on a CPU: a small network of its family and few pixels.

NFNets have no width to choose, and NF-RegNet-B0 stands in for them.
"""


def named(name: str) -> Recipe:
    """The recipe of that name; ``NAME-quick`` is its twin for tests."""
    base = name.removesuffix("-quick")
    if base not in RECIPES:
        raise unknown("recipe", name, [*RECIPES, *(f"{known}-quick" for known in RECIPES)])
    recipe = RECIPES[base]()
    if base == name:
        return recipe
    return quick(recipe).replace(_QUICK[base]) if base in _QUICK else quick(recipe)


def quick(recipe: Recipe) -> Recipe:
    """The same recipe on 64 images for 2 epochs: it shows that everything fits together, not how well it learns."""
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train_size": 64, "val_size": 64}),
            "schedule": recipe.schedule.model_copy(update={"epochs": 2, "warmup": 0.5}),
            "train": Train(seed=recipe.train.seed),
        }
    )
