"""Training under differential privacy: each image's gradient is clipped, noise is added to the sum, an account is kept.

Opacus clips, adds noise and keeps the account, which is of one image that is added or removed. Ours are the draws, in
which each image has the same chance whatever the others do, and each image's gradient, by differentiating the network
for one image and vectorizing over the batch. So it takes every network that treats images apart, whatever its layers,
and each image draws its own dropout.

What is private is the trained weights. Losses and errors of a row are told without noise; torch's generators are not
those of cryptography; and which network, images and settings were chosen spends nothing here. Nor do steps of an epoch
that was interrupted, which nobody was told and which are taken anew.

Sources:
    Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv:1607.00133, algorithm 1; the draws are those of
    its section 3.1. The gradients are taken as in the released code of arXiv:2210.00053.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.data import DataLoader, Sampler

from anybatch import data
from anybatch.driver import Epoch, EpochSampler, Loaders, Run
from anybatch.recipe import Recipe
from anybatch.rows import PrivacyFacts
from anybatch.schemes import scheme
from anybatch.step import training_loss


def check_recipe(recipe: Recipe) -> None:
    """Raise a `ValueError` where a recipe with privacy cannot be trained privately, whatever the images."""
    p = recipe.privacy
    if p.epsilon is None:
        return
    if importlib.util.find_spec("opacus") is None:
        raise ValueError(
            f"privacy.epsilon={p.epsilon} needs the package opacus: pip install 'anybatch[dp]'; null trains without "
            f"privacy"
        )
    made = scheme(recipe.model.scheme)
    if not made.batch_independent:
        raise ValueError(
            f"privacy.epsilon={p.epsilon} does not go with scheme {made.name!r}: it mixes the images of a batch, so "
            f"that no image has a gradient of its own; take ws+gn, gn or kn, say"
        )
    if made.clip is not None:
        raise ValueError(
            f"privacy.epsilon={p.epsilon} does not go with scheme {made.name!r}, which clips the gradient of all "
            f"images: privacy.max_grad_norm clips each image's; leave its clipping part out"
        )


def check_images(recipe: Recipe, split: data.Split) -> None:
    """Raise a `ValueError` where these images cannot be trained on privately by a recipe that `check_recipe` passed."""
    p, images = recipe.privacy, len(split.train)
    if p.epsilon is None:
        return
    if p.delta >= 1 / images:
        raise ValueError(
            f"privacy.delta={p.delta} must be below 1 / {images} training images: above it, telling an image in full "
            f"would count as private"
        )
    if recipe.data.normalize is None and any(split.mean):
        raise ValueError(
            f"privacy.epsilon={p.epsilon} does not go with data.normalize=null: the mean and variance of the training "
            f"images would be told without noise; take unit or symmetric"
        )
    epoch = Epoch.of(recipe, images)
    noise_multiplier(p.epsilon, p.delta, sample_rate(epoch, images), epoch.steps * recipe.schedule.epochs, p.accountant)


def per_sample_gradients(
    model: nn.Module, x: Tensor, y: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's loss and its gradients, in the model's mode; dropout is drawn for each sample apart.

    Args:
        model: (N, C, H, W) to (N, K). Samples must not mix in it; buffers that it writes are refused by torch.
        x: (N, C, H, W), N of 0 or more.
        y: (N,), int64.
        label_smoothing: As `anybatch.step.training_loss` has it.

    Returns:
        (N,) losses, and for each parameter that is trained, by name, (N, *shape) gradients.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if len(x) == 0:
        return x.new_zeros(0), {name: p.new_zeros(0, *p.shape) for name, p in trained.items()}

    def loss(trained: dict[str, Tensor], x_chw: Tensor, label: Tensor) -> Tensor:
        network = partial(functional_call, model, trained)
        return training_loss(network, x_chw.unsqueeze(0), label.unsqueeze(0), label_smoothing=label_smoothing)

    gradients, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")(trained, x, y)
    return losses, gradients


@lru_cache
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp") -> float:
    """The least noise, up to 0.01 of epsilon, with which so many steps stay within the budget, by Opacus' account."""
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet_orders():
            return get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
                epsilon_tolerance=min(0.01, epsilon / 100),
            )
    except ValueError as error:
        raise ValueError(
            f"no noise keeps privacy.epsilon={epsilon} at privacy.delta={delta} over {steps} steps that take each "
            f"image with probability {sample_rate:.3g} ({error}); raise epsilon, or take fewer epochs"
        ) from None


@lru_cache
def epsilon_spent(noise: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp") -> float:
    """Opacus' account of so many steps; 0 for none."""
    from opacus.accountants import create_accountant

    if steps == 0:
        return 0.0
    account = create_accountant(accountant)
    account.history = [(noise, sample_rate, steps)]
    with _quiet_orders():
        return float(account.get_epsilon(delta))


def _quiet_orders() -> warnings.catch_warnings:
    """Opacus warns where the best of its orders is the first or last: another might tell less, and the bound holds."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


class PoissonSampler(Sampler[list[int]]):
    """The steps of an epoch, each of which takes each image with the same probability: of any number, also none.

    Args:
        order: Told by Lightning of each epoch.
        rate: The probability.
        steps: Of an epoch.
        seeded: Whether draws follow from the seed and the epoch; else the operating system is asked.
    """

    def __init__(self, order: EpochSampler, rate: float, steps: int, *, seeded: bool) -> None:
        self.sampler = order  # where Lightning looks for what it tells of the epoch
        self.rate, self.steps, self.seeded = rate, steps, seeded
        self.images = len(order.dataset)  # pyright: ignore[reportArgumentType] (it has a length)

    def __iter__(self) -> Iterator[list[int]]:
        torch.manual_seed(self.sampler.epoch_seed)  # what else is drawn, such as augmentation, dropout
        draws = seeded_generator(self.sampler.epoch_seed if self.seeded else None)
        for _ in range(self.steps):
            taken = torch.rand(self.images, dtype=torch.float64, generator=draws) < self.rate
            yield taken.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return self.steps


def seeded_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that starts from a seed, or from what the operating system gives."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class PrivateLoaders(Loaders):
    """Loaders whose training batches are whole steps; `PrivateRun` takes them ``data.batch_size`` images at a time."""

    def train_dataloader(self) -> DataLoader:
        order = self.epoch_sampler()
        epoch = Epoch.of(self.recipe, len(self.split.train))
        rate = sample_rate(epoch, len(self.split.train))
        return DataLoader(
            self.split.train,  # pyright: ignore[reportArgumentType] (batches come whole)
            batch_sampler=PoissonSampler(order, rate, epoch.steps, seeded=self.recipe.privacy.seeded),
            generator=order.generator,
            num_workers=self.recipe.data.workers,
            collate_fn=data.collate,  # pyright: ignore[reportArgumentType]
        )


def sample_rate(epoch: Epoch, images: int) -> float:
    """With which probability a step takes an image, so that it takes the recipe's number on average."""
    return epoch.samples / epoch.steps / images


class PrivateRun(Run):
    """A run whose steps are private; ``data.batch_size`` images are held at a time, with a gradient for each."""

    KEPT = (*Run.KEPT, "private_steps")

    def __init__(self, model: nn.Module, recipe: Recipe, epoch: Epoch, images: int) -> None:
        super().__init__(model, recipe, epoch)
        self.automatic_optimization = False  # a step has as many batches as its draw needs
        self.images_per_step = epoch.samples // epoch.steps
        self.sample_rate = sample_rate(epoch, images)
        p, steps = recipe.privacy, epoch.steps * recipe.schedule.epochs
        if p.epsilon is None:
            raise ValueError("privacy.epsilon is null: there is no budget to keep")
        self.noise = noise_multiplier(p.epsilon, p.delta, self.sample_rate, steps, p.accountant)
        self.private_steps = 0

    def optimizer(self) -> torch.optim.Optimizer:
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            super().optimizer(),
            noise_multiplier=self.noise,
            max_grad_norm=self.recipe.privacy.max_grad_norm,
            expected_batch_size=self.images_per_step,
        )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # Not the seed of the draws, with whose numbers the noise would go along.
        seed = 7_919 * (self.recipe.train.seed * 1_000_003 + self.trainer.current_epoch) + 1
        self.private.generator = seeded_generator(seed if self.recipe.privacy.seeded else None, self.device)

    @property
    def private(self) -> Any:
        """Opacus' optimizer, which Lightning has wrapped."""
        return self.optimizers(use_pl_optimizer=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y = self.in_format(batch[0]), batch[1]
        wrapped: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        losses = []
        for start in range(0, max(len(y), 1), self.recipe.data.batch_size):
            if start:
                self.private.clip_and_accumulate()
            part = slice(start, start + self.recipe.data.batch_size)
            losses_n, gradients = per_sample_gradients(
                self.model, x[part], y[part], label_smoothing=self.recipe.train.label_smoothing
            )
            losses.append(losses_n)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.grad_sample = gradients[name]  # pyright: ignore[reportAttributeAccessIssue] (Opacus' place for them)
        if len(y):
            self.count(torch.cat(losses).mean(), len(y), batch_idx)
        wrapped.step()
        wrapped.zero_grad()
        schedule.step()
        self.private_steps += 1

    def privacy(self) -> PrivacyFacts:
        p = self.recipe.privacy
        return {
            "epsilon": epsilon_spent(self.noise, p.delta, self.sample_rate, self.private_steps, p.accountant),
            "delta": p.delta,
            "noise_multiplier": self.noise,
            "max_grad_norm": p.max_grad_norm,
            "sample_rate": self.sample_rate,
            "steps": self.private_steps,
        }
