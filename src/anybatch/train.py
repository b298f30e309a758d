"""One run of a recipe: one step function, driven by Lightning, that ends in a row."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchmetrics import MeanMetric

from anybatch import __version__, data, rows
from anybatch.checkpoint import RESUME, ModelFacts, SafeCheckpointIO, save_model, write_atomically
from anybatch.measure import device_name, multiply_adds, saved_bytes
from anybatch.optim import lr_factor, make_optimizer
from anybatch.recipe import Recipe
from anybatch.rows import FORMAT, DataFacts, Evaluation, Row


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: training images seen and to be seen, and the error of the last evaluation, 0 to 1."""

    samples: int
    total: int
    error: float | None


def training_loss(model: nn.Module, x: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The step: cross-entropy of a batch, averaged over its images.

    Args:
        model: (N, C, H, W) to (N, K).
        x: (N, C, H, W), normalized.
        y: (N,), int64, classes from 0 to K - 1.
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567,
            section 7).
    """
    return F.cross_entropy(model(x), y, label_smoothing=label_smoothing)


def evaluate(model: nn.Module, images: data.Images, *, batch_size: int = 256) -> tuple[float, float]:
    """Error (0 to 1) and mean cross-entropy of a model over images, on the model's device, in evaluation mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    wrong, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            x, y = images.__getitems__(range(start, min(start + batch_size, len(images))))
            logits, y = model(x.to(device)), y.to(device)
            wrong += int((logits.argmax(1) != y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
    model.train(was_training)
    return wrong / len(images), loss / len(images)


class EpochSampler(DistributedSampler):
    """Each epoch's order of the images, the same for any number of devices, and a fresh random state for each epoch.

    Whatever is drawn in an epoch follows from (seed, epoch, rank) alone, so that a run that was interrupted goes on as
    if it had not been. A step takes the same images on D devices x batch B as on one device x batch D * B.
    """

    def __init__(self, images: Any, world_size: int, rank: int, seed: int) -> None:
        super().__init__(images, world_size, rank, shuffle=True, seed=seed)
        self.generator = torch.Generator()  # the loader draws its workers' seeds from it

    @property
    def _epoch_seed(self) -> int:
        return (self.seed * 1_000_003 + self.epoch) * 1_009 + self.rank

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.generator.manual_seed(self._epoch_seed)

    def __iter__(self) -> Iterator[int]:
        # Not in set_epoch, which Lightning calls a second time, after the first batch, where a run is resumed.
        torch.manual_seed(self._epoch_seed)
        return super().__iter__()


class _Loaders(L.LightningDataModule):
    def __init__(self, split: data.Split, recipe: Recipe) -> None:
        super().__init__()
        self.split, self.recipe = split, recipe

    def _loader(self, images: Any, batch_size: int, sampler: EpochSampler | None = None) -> DataLoader:
        return DataLoader(
            images,
            batch_size,
            sampler=sampler,
            generator=None if sampler is None else sampler.generator,
            num_workers=self.recipe.data.workers,
            collate_fn=data.collate,  # pyright: ignore[reportArgumentType] (a batch comes whole)
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None  # Lightning sets it before it asks
        sampler = EpochSampler(
            self.split.train, self.trainer.world_size, self.trainer.global_rank, self.recipe.train.seed
        )
        # Lightning starts a resumed run's first loader before it sets the loader's, or its own, epoch right.
        sampler.set_epoch(getattr(self.trainer.lightning_module, "epochs_done", 0))
        return self._loader(self.split.train, self.recipe.data.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        mine = range(self.trainer.global_rank, len(self.split.val), self.trainer.world_size)
        images = self.split.val if self.trainer.world_size == 1 else Subset(self.split.val, mine)
        return self._loader(images, self.recipe.data.eval_batch_size)


class _Run(L.LightningModule):
    """The recipe's model, loss, optimizer and learning curve, as Lightning asks for them."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.val_error = MeanMetric()
        self.val_loss = MeanMetric()
        self.curve: list[Evaluation] = []
        self.epochs_done = 0
        self.samples = 0
        self.train_seconds = 0.0  # of whole epochs, evaluation left out
        self.timed_samples = 0
        self._losses: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model, self.recipe)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.recipe.schedule, step, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        done, epochs = self.trainer.current_epoch + 1, self.recipe.schedule.epochs
        due = done % self.recipe.train.eval_every == 0 or done == epochs
        self.trainer.check_val_every_n_epoch = 1 if due else epochs + 1
        self._losses.clear()
        self._epoch_samples = 0
        self._epoch_start = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = training_loss(self.model, x, y, label_smoothing=self.recipe.train.label_smoothing)
        self._losses.append(loss.detach())
        self._epoch_samples += len(y) * self.trainer.world_size
        # A look at a loss on a GPU waits for it; on the CPU it costs nothing.
        if (not loss.is_cuda or batch_idx % 50 == 0) and not math.isfinite(value := loss.item()):
            step = self.trainer.global_step
            raise DivergedError(
                f"the loss became {value} at step {step} (learning rate {self._lr():.3g}); try a lower one"
            )
        return loss

    def _lr(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_epoch_start(self) -> None:
        self.end_training_part()

    def end_training_part(self) -> None:
        """Stop the clock of training, where an evaluation or the epoch's end comes."""
        if not self._epoch_samples:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.train_seconds += time.perf_counter() - self._epoch_start
        self.timed_samples += self._epoch_samples
        self.samples += self._epoch_samples
        self._epoch_start, self._epoch_samples = time.perf_counter(), 0

    def on_train_epoch_end(self) -> None:
        self.end_training_part()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = self.model(x).float()
        self.val_error.update((logits.argmax(1) != y).float())
        self.val_loss.update(F.cross_entropy(logits, y, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        train_loss = torch.stack(self._losses).mean()
        point: Evaluation = {
            "epoch": self.trainer.current_epoch + 1,
            "samples": self.samples,
            "train_loss": float(self.trainer.strategy.reduce(train_loss, reduce_op="mean")),
            "val_loss": self.val_loss.compute().item(),
            "error": self.val_error.compute().item(),
        }
        self.val_error.reset()
        self.val_loss.reset()
        if not math.isfinite(point["train_loss"]):
            raise DivergedError(
                f"the loss became {point['train_loss']} in epoch {point['epoch']}; try a lower learning rate"
            )
        # An evaluation can overflow where training did not; a row holds no infinities.
        point["val_loss"] = min(point["val_loss"], 1e30) if not math.isnan(point["val_loss"]) else 1e30
        self.curve.append(point)
        self.log_dict(
            {key: float(point[key]) for key in ("samples", "train_loss", "val_loss", "error")}, rank_zero_only=True
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs_done = self.trainer.current_epoch + 1  # saved at the end of an epoch
        names = ("curve", "epochs_done", "samples", "train_seconds", "timed_samples")
        checkpoint["run"] = {"id": self.recipe.id, **{name: getattr(self, name) for name in names}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = dict(checkpoint.get("run", {}))
        if state.pop("id", None) != self.recipe.id:
            raise ValueError("the folder holds the state of another recipe; give another --out, or delete the folder")
        for name, value in state.items():
            setattr(self, name, value)


class _Reporter(L.Callback):
    """Tells how far a run is, a few times a second."""

    def __init__(self, tell: Callable[[Progress], None], total: int) -> None:
        self.tell, self.total, self.last = tell, total, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self.last > 0.25:
            self.last = now
            self._tell(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(pl_module)

    def _tell(self, run: Any) -> None:
        self.tell(Progress(run.samples + run._epoch_samples, self.total, run.curve[-1]["error"] if run.curve else None))


class _StateKeeper(L.Callback):
    """Writes the whole state after each epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, _Run)
        pl_module.end_training_part()  # the module's own hook comes after the callbacks'
        trainer.save_checkpoint(self.path)


def run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    purpose: str = "run",
    loggers: Any = False,
    tell: Callable[[Progress], None] | None = None,
) -> Row:
    """Train and evaluate once.

    Args:
        recipe: The whole run.
        out: Folder for ``model.safetensors``, ``model.json`` and, while the run is unfinished, ``resume.safetensors``,
            from which it goes on; None writes nothing.
        purpose: What the row says it is for, ``"run"`` or ``"tune"``.
        loggers: Lightning loggers.
        tell: Called a few times a second.

    Returns:
        The row of the finished run.

    Raises:
        ValueError: If the recipe names something unknown or does not fit the data.
        DivergedError: If the loss is no longer a number.
    """
    started = time.perf_counter()
    row = _blank_row(recipe, purpose)
    split = data.load(recipe.data)
    row["data"] = data_facts(split)
    torch.manual_seed(recipe.train.seed)
    model = recipe.model.build(num_classes=len(split.classes), in_chans=split.in_chans)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["multiply_adds"] = multiply_adds(model, torch.zeros(1, split.in_chans, split.size, split.size))
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)

    n, t, d = len(split.train), recipe.train, recipe.data
    batches = math.ceil(math.ceil(n / t.devices) / d.batch_size)
    module = _Run(model, recipe, math.ceil(batches / d.accumulate))
    callbacks: list[L.Callback] = []
    if t.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=t.ema))
    if tell is not None:
        callbacks.append(_Reporter(tell, n * recipe.schedule.epochs))
    resume = None if out is None else out / RESUME
    if resume is not None:
        callbacks.append(_StateKeeper(resume))
    with _quiet():
        trainer = L.Trainer(
            accelerator=t.accelerator,
            devices=t.devices,
            strategy="ddp" if t.devices > 1 else "auto",
            precision=t.precision,
            max_epochs=recipe.schedule.epochs,
            accumulate_grad_batches=d.accumulate,
            gradient_clip_val=recipe.optim.clip_norm,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            logger=loggers,
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=max(1, module.steps_per_epoch),
        )
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            x, y = split.train.__getitems__(range(min(d.batch_size, n)))
            row["peak_memory"] = counted_memory(module, x, y)
        row["device"] = device_name(device)
        trainer.fit(
            module,
            datamodule=_Loaders(split, recipe),
            ckpt_path=str(resume) if resume is not None and resume.exists() else None,
        )
    if device.type == "cuda":
        row["peak_memory"] = torch.cuda.max_memory_allocated(device)
        row["memory_measure"] = "peak of the device's allocator"
    row["curve"] = module.curve
    row["error"] = module.curve[-1]["error"]
    row["images_per_second"] = module.timed_samples / module.train_seconds
    row["seconds"] = time.perf_counter() - started
    if out is not None and resume is not None and trainer.is_global_zero:
        facts = ModelFacts(
            recipe=recipe.model_dump(mode="json"),
            classes=list(split.classes),
            in_chans=split.in_chans,
            size=split.size,
            mean=list(split.mean),
            std=list(split.std),
            error=row["error"],
            epochs=recipe.schedule.epochs,
            version=__version__,
        )
        save_model(module.model, facts, out)
        resume.unlink(missing_ok=True)
    return row


def failed_row(recipe: Recipe, purpose: str, message: str, seconds: float) -> Row:
    """The row of a run that ended with an error."""
    row = _blank_row(recipe, purpose)
    row["status"], row["message"], row["seconds"] = "failed", message, seconds
    return row


def _blank_row(recipe: Recipe, purpose: str) -> Row:
    return {
        "format": FORMAT,
        "id": recipe.id,
        "purpose": purpose,
        "status": "ok",
        "message": None,
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "device": "",
        "threads": torch.get_num_threads(),
        "seed": recipe.train.seed,
        "data": None,
        "peak_lr": recipe.peak_lr,
        "parameters": None,
        "multiply_adds": None,
        "curve": [],
        "error": None,
        "images_per_second": None,
        "peak_memory": None,
        "memory_measure": "weights, gradients, optimizer state and tensors kept for the backward pass",
        "seconds": 0.0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_facts(split: data.Split) -> DataFacts:
    """What a row says of its data."""
    return {
        "name": split.name,
        "train_images": len(split.train),
        "val_images": len(split.val),
        "classes": list(split.classes),
        "note": split.note,
    }


def versions() -> dict[str, str]:
    """Versions on which a result can depend."""
    return {
        "anybatch": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
    }


def counted_memory(module: _Run, x: Tensor, y: Tensor) -> int:
    """Bytes of weights, gradients and optimizer state, and of the tensors that one step keeps for its backward pass.

    Counted on a copy, and nothing random is drawn from the run's own state.
    """
    model = copy.deepcopy(module.model).train()
    if module.recipe.train.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        kept = saved_bytes(model, lambda: training_loss(model, x, y))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = {"sgd": 3 if module.recipe.optim.momentum else 2, "adamw": 4}[module.recipe.optim.name]
    return weights * copies + kept


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice on loaders and devices does not reach the user; its errors do."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|TreeSpec|lr_scheduler.step).*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def run_in(
    recipe: Recipe, out: Path, *, tell: Callable[[Progress], None] | None = None, tensorboard: bool = False
) -> Row:
    """Train in a folder of its own, going on where an interrupted run of the same recipe stopped.

    Leaves ``recipe.yaml``, ``metrics.csv``, ``model.safetensors``, ``model.json`` and a row in ``rows.jsonl``.

    Raises:
        ValueError: If the folder holds another recipe's run, or this one's, finished.
    """
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    path = out / "recipe.yaml"
    if path.exists():
        if Recipe.read(path) != recipe:
            raise ValueError(f"{out} holds the run of another recipe; give another --out")
        if any(row["id"] == recipe.id and row["status"] == "ok" for row in rows.read(out / "rows.jsonl")):
            raise ValueError(
                f"{out} holds this very run, finished; give another --out, or delete the folder to repeat it"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, recipe.to_yaml().encode())
    rows.repair(out / "rows.jsonl")
    loggers: list[Any] = [CSVLogger(out, name=None, version="")]
    if tensorboard:
        loggers.append(TensorBoardLogger(out, name=None, version=""))
    began = time.perf_counter()
    try:
        row = run(recipe, out=out, loggers=loggers, tell=tell)
    except DivergedError as error:
        row = failed_row(recipe, "run", str(error), time.perf_counter() - began)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes the first writes
        rows.append(out / "rows.jsonl", row)
    return row
