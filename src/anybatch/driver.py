"""What Lightning is told: how a recipe's images are portioned out, how its model steps, what is kept after an epoch."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchmetrics import MeanMetric

from anybatch import data
from anybatch.files import write_file
from anybatch.optim import SAM, lr_factor, make_optimizer
from anybatch.recipe import Recipe
from anybatch.rows import Evaluation, PrivacyFacts
from anybatch.schemes import scheme
from anybatch.step import DivergedError, training_loss, wrong_and_losses


@dataclass(frozen=True)
class Progress:
    """Where a run stands: training images seen and to be seen, and the error of the last evaluation, 0 to 1."""

    samples: int
    total: int
    error: float | None


@dataclass(frozen=True)
class Epoch:
    """An epoch in whole batches: BatchNorm would suffer from a shorter last one, and a step from a shorter average.

    The few images that are left over differ from epoch to epoch.
    """

    batches: int
    """Of each device."""
    steps: int
    samples: int
    """Of all devices."""

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> Epoch:
        """The epoch of a recipe over so many images; a `ValueError` if they are too few for one step."""
        d, devices = recipe.data, recipe.train.devices
        per_step = d.batch_size * d.accumulate * devices
        if images < per_step:
            raise ValueError(
                f"a step takes {per_step} images (data.batch_size={d.batch_size} x data.accumulate={d.accumulate} x "
                f"train.devices={devices}), more than the {images} training images"
            )
        steps = images // per_step
        return cls(batches=steps * d.accumulate, steps=steps, samples=steps * per_step)


class EpochSampler(DistributedSampler):
    """Each epoch's order of the images, the same for any number of devices, and a fresh random state for each epoch.

    Whatever is drawn in an epoch follows from (seed, epoch, rank) alone, so that a run that was interrupted goes on as
    if it had not been. A step takes the same images on D devices x batch B as on one device x batch D * B.
    """

    def __init__(self, images: Any, world_size: int, rank: int, seed: int) -> None:
        # torch's sampler orders by seed + epoch: seeds that are next to each other would share their orders.
        super().__init__(images, world_size, rank, shuffle=True, seed=seed * 1_000_003, drop_last=True)
        self.generator = torch.Generator()  # the loader draws its workers' seeds from it

    @property
    def epoch_seed(self) -> int:
        """From which this rank draws in this epoch."""
        return (self.seed + self.epoch) * 1_009 + self.rank

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.generator.manual_seed(self.epoch_seed)

    def __iter__(self) -> Iterator[int]:
        # Not in set_epoch, which Lightning calls a second time, after the first batch, where a run is resumed.
        torch.manual_seed(self.epoch_seed)
        return super().__iter__()


class Loaders(L.LightningDataModule):
    """Loaders for the rank that asks."""

    def __init__(self, split: data.Split, recipe: Recipe) -> None:
        super().__init__()
        self.split, self.recipe = split, recipe

    def _loader(self, images: Any, batch_size: int, sampler: EpochSampler | None = None) -> DataLoader:
        d = self.recipe.data
        collate = data.collate
        if sampler is not None and (d.mixup is not None or d.cutmix is not None):
            collate = data.Mix(len(self.split.classes), d.mixup, d.cutmix)
        return DataLoader(
            images,
            batch_size,
            sampler=sampler,
            generator=None if sampler is None else sampler.generator,
            num_workers=self.recipe.data.workers,
            collate_fn=collate,  # pyright: ignore[reportArgumentType] (a batch comes whole)
            pin_memory=self._trainer.strategy.root_device.type == "cuda",
            drop_last=sampler is not None,
        )

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("Lightning asks for loaders before it has set the trainer")
        return self.trainer

    def epoch_sampler(self) -> EpochSampler:
        """The order of the training images."""
        trainer = self._trainer
        sampler = EpochSampler(self.split.train, trainer.world_size, trainer.global_rank, self.recipe.train.seed)
        # Lightning starts a resumed run's first loader before it sets the loader's, or its own, epoch right.
        sampler.set_epoch(getattr(trainer.lightning_module, "epochs_done", 0))
        return sampler

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.split.train, self.recipe.data.batch_size, self.epoch_sampler())

    def val_dataloader(self) -> DataLoader:
        world_size, rank = self._trainer.world_size, self._trainer.global_rank
        mine = range(rank, len(self.split.val), world_size)
        images = self.split.val if world_size == 1 else Subset(self.split.val, mine)
        return self._loader(images, self.recipe.data.eval_batch_size)


class Run(L.LightningModule):
    """The recipe's model, step, optimizer and learning curve, as Lightning asks for them."""

    # What a resumed run needs beside weights and optimizer.
    KEPT = ("curve", "epochs_done", "samples", "train_seconds", "timed_samples")

    def __init__(self, model: nn.Module, recipe: Recipe, epoch: Epoch) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        mode = recipe.train.compile
        # Of a function: a module would be a second one here, with the same parameters.
        self._call: Callable[[Tensor], Tensor] = model.__call__
        if mode is not None:
            self._call = torch.compile(model.__call__, mode=mode)
        self.steps_per_epoch = epoch.steps
        clip = scheme(recipe.model.scheme).clip
        self.clip = None if clip is None else clip(model)
        self.val_error = MeanMetric()
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.curve: list[Evaluation] = []
        self.epochs_done = 0
        self.samples = 0
        self.train_seconds = 0.0  # evaluation left out
        self.timed_samples = 0
        self.peak_memory = 0  # on a GPU, evaluation left out
        self.epoch_samples = 0
        self._losses: list[Tensor] = []

    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the weights."""
        return make_optimizer(self.model, self.recipe)

    def privacy(self) -> PrivacyFacts | None:
        """What was spent so far; None where training is not private."""
        return None

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.recipe.schedule, step, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        done, epochs = self.trainer.current_epoch + 1, self.recipe.schedule.epochs
        due = done % self.recipe.train.eval_every == 0 or done == epochs
        self.trainer.check_val_every_n_epoch = 1 if due else epochs + 1
        self._losses.clear()
        self.epoch_samples = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._epoch_start = time.perf_counter()

    def in_format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.recipe.train.channels_last else x

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = training_loss(self._call, self.in_format(x), y, label_smoothing=self.recipe.train.label_smoothing)
        if self._is_second_evaluation():
            return loss  # of the same images, elsewhere
        self.count(loss, len(y), batch_idx)
        return loss

    def count(self, loss: Tensor, images: int, batch_idx: int) -> None:
        """Take note of a batch, before its step."""
        self._losses.append(loss.detach())
        self.epoch_samples += images * self.trainer.world_size
        # On the CPU a look at each loss costs nothing; on a GPU, or with other ranks, it waits for them.
        if batch_idx % 50 == 0 or (loss.device.type == "cpu" and self.trainer.world_size == 1):
            self._check(loss)

    def _check(self, loss: Tensor) -> None:
        """Stop on all ranks where the loss of one is no longer a number."""
        value = loss.item()
        if not self.trainer.strategy.reduce_boolean_decision(math.isfinite(value), all=True):
            step, lr = self.trainer.global_step, self.trainer.optimizers[0].param_groups[0]["lr"]
            raise DivergedError(f"the loss became {value} at step {step} (learning rate {lr:.3g}); try a lower one")

    def _is_second_evaluation(self) -> bool:
        optimizer = self.trainer.optimizers[0]
        return isinstance(optimizer, SAM) and optimizer.perturbed

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # SAM's first gradient only says where to go for the second, by which it steps.
        if self.clip is not None and (not isinstance(optimizer, SAM) or optimizer.perturbed):
            self.clip()

    def on_validation_epoch_start(self) -> None:
        self.end_training_part()

    def on_train_epoch_end(self) -> None:
        self.end_training_part()

    def end_training_part(self) -> None:
        """Stop the clock of training, where an evaluation or the epoch's end comes."""
        if not self.epoch_samples:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated(self.device))
        self.train_seconds += time.perf_counter() - self._epoch_start
        self.timed_samples += self.epoch_samples
        self.samples += self.epoch_samples
        self.epoch_samples = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        wrong, losses = wrong_and_losses(self.model, self.in_format(x), y)
        self.val_error.update(wrong)
        self.val_loss.update(losses)

    def on_validation_epoch_end(self) -> None:
        train_loss = torch.stack(self._losses).mean()
        self._check(train_loss)
        val_loss = self.val_loss.compute().item()
        point: Evaluation = {
            "epoch": self.trainer.current_epoch + 1,
            "samples": self.samples,
            "train_loss": float(self.trainer.strategy.reduce(train_loss, reduce_op="mean")),
            "val_loss": val_loss if math.isfinite(val_loss) else None,
            "error": self.val_error.compute().item(),
        }
        if (spent := self.privacy()) is not None:
            point["epsilon"] = spent["epsilon"]
        self.val_error.reset()
        self.val_loss.reset()
        self.curve.append(point)
        self.log_dict(
            {"error": point["error"], "train_loss": point["train_loss"], "val_loss": val_loss}, rank_zero_only=True
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs_done = self.trainer.current_epoch + 1  # saved at the end of an epoch
        checkpoint["run"] = {"id": self.recipe.id, **{name: getattr(self, name) for name in self.KEPT}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = dict(checkpoint.get("run", {}))
        if state.pop("id", None) != self.recipe.id:
            raise ValueError("the folder holds the state of another recipe; give another --out, or delete the folder")
        for name, value in state.items():
            setattr(self, name, value)


def _the_run(module: L.LightningModule) -> Run:
    if not isinstance(module, Run):
        raise TypeError(f"these callbacks belong to a Run, got {type(module).__name__}")
    return module


class Reporter(L.Callback):
    """Tells how far a run is, a few times a second."""

    def __init__(self, tell: Callable[[Progress], None], total: int) -> None:
        self.tell, self.total, self.last = tell, total, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self.last > 0.25:
            self.last = now
            self._report(_the_run(pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(_the_run(pl_module))

    def _report(self, run: Run) -> None:
        error = run.curve[-1]["error"] if run.curve else None
        self.tell(Progress(run.samples + run.epoch_samples, self.total, error))


class StateKeeper(L.Callback):
    """Writes the whole state, and the learning curve as ``metrics.csv``, after each epoch."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = _the_run(pl_module)
        run.end_training_part()  # the module's own hook comes after the callbacks'
        trainer.save_checkpoint(self.state)
        if trainer.is_global_zero and run.curve:
            table = io.StringIO()
            writer = csv.DictWriter(table, list(run.curve[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(run.curve)
            write_file(self.state.with_name("metrics.csv"), table.getvalue().encode())
