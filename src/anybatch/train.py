"""One run of a recipe, driven by Lightning, that ends in a row."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor

from anybatch import __version__, data, private, rows
from anybatch.checkpoint import RESUME, ModelFacts, SafeCheckpointIO, save_model
from anybatch.driver import Epoch, Loaders, Progress, Reporter, Run, StateKeeper
from anybatch.files import write_file
from anybatch.measure import device_name, multiply_adds, saved_bytes
from anybatch.methods.filters import reuse_filters
from anybatch.models import load_weights
from anybatch.recipe import Recipe
from anybatch.rows import FORMAT, DataFacts, Row
from anybatch.step import DivergedError, training_loss
from anybatch.suggest import one_line


def run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    purpose: str = "run",
    tensorboard: bool = False,
    tell: Callable[[Progress], None] | None = None,
) -> Row:
    """Train and evaluate once.

    Args:
        recipe: The whole run.
        out: Folder for ``model.safetensors``, ``model.json``, ``metrics.csv`` and, while the run is unfinished,
            ``resume.safetensors``, from which it goes on; None writes nothing.
        purpose: What the row says it is for, ``"run"`` or ``"tune"``.
        tensorboard: Whether to log for TensorBoard into ``out``.
        tell: Called a few times a second.

    Returns:
        The row of the run, a failed one if the loss became no number.

    Raises:
        ValueError: If the recipe names something unknown or does not fit the data.
        KeyboardInterrupt: If it was interrupted; the state of the last whole epoch is in ``out``.
    """
    started = time.perf_counter()
    row = _blank_row(recipe, purpose)
    split = _images(recipe)
    epoch = _checked_epoch(recipe, split)
    row["data"] = data_facts(split)
    torch.manual_seed(recipe.train.seed)
    model = recipe.model.build(num_classes=len(split.classes), in_chans=split.in_chans)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["multiply_adds"] = multiply_adds(model, torch.zeros(1, split.in_chans, split.size, split.size))
    if recipe.model.weights is not None:
        load_weights(model, recipe.model.weights, classifier="skip")
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)
    is_private = recipe.privacy.epsilon is not None
    module = private.PrivateRun(model, recipe, epoch, len(split.train)) if is_private else Run(model, recipe, epoch)
    loaders = private.PrivateLoaders(split, recipe) if is_private else Loaders(split, recipe)
    resume = None if out is None else out / RESUME
    with _quiet():
        trainer = _trainer(recipe, epoch, resume, out if tensorboard else None, tell)
        device = trainer.strategy.root_device
        row["device"] = device_name(device)
        if is_private and device.type != "cuda":
            row["memory_measure"] = "not counted where each image has gradients of its own"
        elif device.type != "cuda":
            x, y = split.train.__getitems__(range(recipe.data.batch_size))
            row["peak_memory"] = counted_memory(module, x, y, trainer)
        try:
            with reuse_filters(module.model):  # once a step, however many batches it accumulates
                trainer.fit(
                    module,
                    datamodule=loaders,
                    ckpt_path=str(resume) if resume is not None and resume.exists() else None,
                )
        except DivergedError as error:
            row["status"], row["message"] = "failed", str(error)
        except RuntimeError as error:
            if recipe.train.compile is None or not type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor")
            ):
                raise
            told = one_line(error, 300)
            raise ValueError(
                f"train.compile={recipe.train.compile}: torch.compile failed ({told}); it needs a C++ compiler on the "
                f"CPU and Triton on a GPU; leave it out to train as it stands"
            ) from None
        except SystemExit:  # what Lightning makes of Ctrl-C and of a signal to end
            raise KeyboardInterrupt from None
    if device.type == "cuda":
        row["peak_memory"] = module.peak_memory or None
        row["memory_measure"] = "peak of the device's allocator in training"
    row["curve"] = module.curve
    if (spent := module.privacy()) is not None:
        row["privacy"] = spent
    row["seconds"] = time.perf_counter() - started
    if row["status"] == "failed":
        return row
    row["error"] = module.curve[-1]["error"]
    row["images_per_second"] = module.timed_samples / module.train_seconds
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
            epsilon=None if spent is None else spent["epsilon"],
        )
        save_model(module.model, facts, out)
        resume.unlink(missing_ok=True)
    return row


def _images(recipe: Recipe) -> data.Split:
    """The recipe's images, which are not read in vain."""
    private.check_recipe(recipe)
    return data.load(recipe.data)


def _checked_epoch(recipe: Recipe, split: data.Split) -> Epoch:
    """The recipe's epoch, where it can be trained on these images."""
    epoch = Epoch.of(recipe, len(split.train))
    private.check_images(recipe, split)
    return epoch


def _trainer(
    recipe: Recipe, epoch: Epoch, resume: Path | None, log: Path | None, tell: Callable[[Progress], None] | None
) -> L.Trainer:
    """Lightning's trainer for the recipe, with nothing of its own on the screen or on disk."""
    t = recipe.train
    callbacks: list[L.Callback] = []
    if t.ema is not None:
        warm = partial(warm_average, decay=t.ema)
        callbacks.append(WeightAveraging(avg_fn=warm) if t.ema_warmup else EMAWeightAveraging(decay=t.ema))
    if tell is not None:
        callbacks.append(Reporter(tell, epoch.samples * recipe.schedule.epochs))
    if resume is not None:
        callbacks.append(StateKeeper(resume))
    logger: Any = False
    if log is not None:
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(log, name=None, version="")
    return L.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        strategy="ddp" if t.devices > 1 else "auto",
        precision=t.precision,
        max_epochs=recipe.schedule.epochs,
        limit_train_batches=epoch.batches,
        accumulate_grad_batches=recipe.data.accumulate if recipe.privacy.epsilon is None else 1,
        gradient_clip_val=recipe.optim.clip_norm,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=epoch.batches,
    )


def warm_average(average: Tensor, value: Tensor, step: Tensor, *, decay: float) -> Tensor:
    """The next moving average, with ``decay`` or ``(1 + step) / (10 + step)`` where that is less.

    Source:
        Brock et al. 2021, arXiv:2102.06171, appendix A.
    """
    return average + (1 - ((1 + step) / (10 + step)).clamp(max=decay)) * (value - average)


def run_in(
    recipe: Recipe, out: Path, *, tell: Callable[[Progress], None] | None = None, tensorboard: bool = False
) -> Row:
    """Train in a folder of its own, going on where an interrupted run of the same recipe stopped.

    Leaves ``recipe.yaml``, ``metrics.csv``, ``model.safetensors``, ``model.json`` and a row in ``rows.jsonl``.

    Raises:
        ValueError: If the folder holds another recipe's run, this one's, finished, or other things; or as `run` does,
            before anything is written.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install 'anybatch[tensorboard]'")
    first = (
        os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    )  # of several processes, the one that writes
    path = out / "recipe.yaml"
    if first:
        _check_folder(recipe, out)
        split = _images(recipe)
        _checked_epoch(recipe, split)
        with torch.device("meta"):
            recipe.model.build(num_classes=len(split.classes), in_chans=split.in_chans)
        if (weights := recipe.model.weights) is not None and not Path(weights).is_file():
            raise ValueError(f"model.weights={weights} is not a file; give weights to start from, or null for none")
        out.mkdir(parents=True, exist_ok=True)
        write_file(path, recipe.to_yaml().encode())
        rows.repair(out / "rows.jsonl")
    row = run(recipe, out=out, tensorboard=tensorboard, tell=tell)
    if first:
        rows.append(out / "rows.jsonl", row)
    return row


def _check_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a folder in which something would be lost."""
    path = out / "recipe.yaml"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no run; give another --out")
        return
    same = Recipe.read(path).id == recipe.id
    finished = any(row["status"] == "ok" for row in rows.read(out / "rows.jsonl"))
    if same and finished:
        raise ValueError(f"{out} holds this very run, finished; give another --out, or delete the folder to repeat it")
    if not same and (finished or (out / RESUME).exists()):
        raise ValueError(f"{out} holds the run of another recipe; give another --out")


def failed_row(recipe: Recipe, purpose: str, message: str, seconds: float) -> Row:
    """The row of a run that ended before it could tell more than why."""
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


def counted_memory(module: Run, x: Tensor, y: Tensor, trainer: L.Trainer) -> int:
    """Bytes of weights, gradients and optimizer state, and of the tensors that one step keeps for its backward pass.

    Counted on a copy at the trainer's precision, and nothing random is drawn from the run's own state.
    """
    precision, recipe = trainer.precision_plugin, module.recipe
    model = precision.convert_module(copy.deepcopy(module.model).train())
    if recipe.train.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x, y = precision.convert_input((x, y))
    with torch.random.fork_rng(devices=[]), precision.forward_context():
        kept = saved_bytes(model, lambda: training_loss(model, x, y))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = {"sgd": 3 if recipe.optim.momentum else 2, "adamw": 4}[recipe.optim.name] + (recipe.train.ema is not None)
    copies += recipe.optim.sam_rho is not None
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
