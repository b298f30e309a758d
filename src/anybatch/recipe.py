"""The Recipe: one complete run, checked, frozen, written as YAML."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anybatch.suggest import unknown

if TYPE_CHECKING:
    from anybatch.models import Network


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(_Section):
    """Which network, normalized how."""

    name: str = "resnet8"
    scheme: str = "ws+gn"
    """How it normalizes. Where `Recipe.parse` finds a name and no scheme, it takes the network's own."""
    options: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    """The network's own arguments, as ``{width: 32, stem: cifar}``."""
    weights: str | None = None
    """A file of weights to start from, as `anybatch.models.load_weights` reads it; the classifier starts afresh."""

    def build(self, *, num_classes: int, in_chans: int) -> Network:
        """The network, from torch's random state; a `ValueError` as of `anybatch.create_model`."""
        from anybatch.models.registry import create_network

        model = create_network(self.name, self.scheme, self.options, num_classes=num_classes, in_chans=in_chans)
        if model.dense:
            raise ValueError(
                f"{self.name} gives a map of logits, for segmentation; runs take networks that tell images apart"
            )
        return model


class Data(_Section):
    """Which images, in which portions."""

    name: str = "digits"
    """A data set's name (`anybatch list --data`)."""
    root: str | None = None
    """Folder or file that holds it; the embedded digits need none."""
    train_size: int | None = Field(default=None, ge=1)
    """Use this many training images, balanced over the classes; None for all."""
    val_size: int | None = Field(default=None, ge=1)
    """Use this many images for evaluation, balanced over the classes; None for all."""
    val_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Set this share of the training images aside for evaluation, in place of the data set's own split."""
    size: int | None = Field(default=None, ge=1)
    """Height and width in pixels to which images are brought; None keeps the data set's own."""
    augment: tuple[Literal["crop", "flip", "randaugment"], ...] = ()
    """What happens to training images: random crops, horizontal flips, torchvision's RandAugment."""
    crop_area: float = Field(default=0.35, gt=0, le=1)
    """Smallest share of the area that a random crop keeps of an image that is larger than ``size``."""
    randaugment_layers: int = Field(default=2, ge=1)
    """Operations that RandAugment applies to an image, one after another."""
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    """Their strength, on torchvision's scale from 0 to 30."""
    mixup: float | None = Field(default=None, gt=0)
    """MixUp with ratios drawn from Beta(mixup, mixup); None for none. With ``cutmix`` too, each takes half a batch."""
    cutmix: float | None = Field(default=None, gt=0)
    """CutMix with areas drawn from Beta(cutmix, cutmix); None for none."""
    eval_size: int | None = Field(default=None, ge=1)
    """Height and width of images in evaluation; None for those of training."""
    normalize: Literal["unit", "symmetric"] | None = None
    """What 0..255 becomes: 0..1, or -1..1; None for mean 0 and variance 1 over the training images."""
    seed: int = Field(default=0, ge=0)
    """Decides splits, subsets and exposures; the same for every run of a study."""
    batch_size: int = Field(default=2, ge=1)
    """B, images that one device takes at a time: what a norm sees."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged before a step."""
    eval_batch_size: int = Field(default=256, ge=1)
    """Images at a time in evaluation."""
    workers: int = Field(default=0, ge=0)
    """Processes that load images; 0 loads in the training process."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Set this share of the training images aside and evaluate on it, to choose settings without a look at the rest."""
    skip_bad: bool = False
    """Leave out images that cannot be read, instead of stopping."""


class Optim(_Section):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate at ``lr_batch`` images a step."""
    lr_batch: int = Field(default=32, ge=1)
    """Images a step for which ``lr`` is meant."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the peak follows the images a step (batch size x accumulation x devices)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD; AdamW's first beta."""
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    """On filters and the classifier's weights; on norms and biases only with ``decay_all``."""
    decay_all: bool = False
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; None for no clipping."""
    sam_rho: float | None = Field(default=None, gt=0)
    """Radius of sharpness-aware minimization, which evaluates each batch twice; None for plain steps."""


class Schedule(_Section):
    """How long, and how the learning rate moves: linear warm-up, then cosine, steps or constant."""

    name: Literal["cosine", "constant", "step"] = "cosine"
    epochs: int = Field(default=8, ge=1)
    warmup: float = Field(default=0.5, ge=0)
    """Length of the warm-up, in epochs."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """Where the cosine ends, as a share of the peak."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Of ``step``: after which shares of the whole run the learning rate is multiplied by ``factor``."""
    factor: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_milestones(self) -> Self:
        inside = [0.0, *self.milestones, 1.0]
        if any(a >= b for a, b in itertools.pairwise(inside)):
            raise ValueError(f"schedule.milestones must rise between 0 and 1, got {list(self.milestones)}")
        return self


class Train(_Section):
    """How it is run."""

    seed: int = Field(default=0, ge=0)
    """Initial weights, order of the images, augmentation."""
    devices: int = Field(default=1, ge=1)
    """Devices, or processes on the CPU, that train together."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    channels_last: bool = False
    compile: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """A mode of torch.compile for the training step, of which reduce-overhead and max-autotune capture CUDA graphs on a
    GPU; None runs it as it stands. Evaluation is not compiled. The first step takes a minute or so."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and saved; None for none."""
    ema_warmup: bool = False
    """Let that average forget faster at first: at step t by ``min(ema, (1 + t) / (10 + t))``."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""


class Privacy(_Section):
    """Training under differential privacy; see `anybatch.private`."""

    epsilon: float | None = Field(default=None, gt=0)
    """Budget of the whole run, where data sets that differ in one image are neighbors; None trains without privacy."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Must be below one in the number of training images."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of one image's gradient; the noise is proportional to it."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """Opacus' account: Rényi divergences, as publications mostly have, or composition in numbers, which is tighter."""
    seeded: bool = False
    """Whether draws and noise follow from ``train.seed``, as in tests: who knows the seed can take the noise off."""


# Keys that came after the first rows were kept: at their defaults they leave a recipe's id as it was.
_ADDED = {
    "model": ("weights",),
    "data": (
        "crop_area",
        "randaugment_layers",
        "randaugment_magnitude",
        "mixup",
        "cutmix",
        "eval_size",
        "normalize",
    ),
    "optim": ("sam_rho",),
    "schedule": ("floor", "milestones", "factor"),
    "train": ("ema_warmup", "compile"),
    "privacy": tuple(Privacy.model_fields),
}


class Recipe(_Section):
    """One complete run. Sections and keys stand in the YAML as they stand here.

    >>> Recipe().replace({"data.batch_size": "4"}).data.batch_size
    4
    """

    model: Model = Field(default_factory=lambda: Model(options={"width": 32}))
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    schedule: Schedule = Field(default_factory=Schedule)
    train: Train = Field(default_factory=Train)
    privacy: Privacy = Field(default_factory=Privacy)

    @model_validator(mode="after")
    def _check_sam(self) -> Self:
        if self.optim.sam_rho is not None:
            if self.data.accumulate > 1:
                raise ValueError(
                    f"optim.sam_rho needs both its gradients of all of a step's images, and with data.accumulate="
                    f"{self.data.accumulate} only the last batch is evaluated twice; take a larger batch"
                )
            if self.train.precision == "16-mixed":
                raise ValueError(
                    "optim.sam_rho does not go with train.precision=16-mixed, whose scaled gradients take one "
                    "evaluation a step; take bf16-mixed"
                )
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> Self:
        if self.privacy.epsilon is None:
            return self
        wrong = {
            f"optim.sam_rho={self.optim.sam_rho}: it takes two gradients a step": self.optim.sam_rho is not None,
            f"optim.clip_norm={self.optim.clip_norm}: privacy.max_grad_norm clips, each image's gradient": (
                self.optim.clip_norm is not None
            ),
            "data.mixup or data.cutmix: they mix images": self.data.mixup is not None or self.data.cutmix is not None,
            f"train.devices={self.train.devices}: it runs on one": self.train.devices > 1,
            f"train.precision={self.train.precision}: it takes 32-true or 64-true": "mixed" in self.train.precision,
            f"train.compile={self.train.compile}: each image has gradients of its own": self.train.compile is not None,
        }
        reasons = [reason for reason, found in wrong.items() if found]
        if reasons:
            raise ValueError(f"privacy.epsilon={self.privacy.epsilon} does not go with {'; nor with '.join(reasons)}")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "recipe") -> Self:
        """The recipe that nested values describe.

        Raises:
            ValueError: Naming each wrong key with the nearest known one, and each wrong value with what would do.
        """
        model = values.get("model")
        if isinstance(model, Mapping) and isinstance(name := model.get("name"), str) and "scheme" not in model:
            from anybatch.models import model_entry

            values = {**values, "model": {**model, "scheme": model_entry(name).scheme}}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error, cls)}") from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The recipe in a YAML file."""
        return cls.parse(read_yaml(path), where=str(path))

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some values changed, each named by its dotted path; texts are read as YAML reads them."""
        values = self.model_dump()
        for path, value in changes.items():
            *sections, key = path.split(".")
            target = values
            known: type[BaseModel] | None = type(self)
            for section in [*sections, key]:
                if known is not None and section not in known.model_fields:
                    raise unknown("key", section, known.model_fields, where=f" in {path!r}")
                annotation = known.model_fields[section].annotation if known is not None else None
                known = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
            for section in sections:
                if not isinstance(target.get(section), dict):
                    raise ValueError(f"{path!r}: {section!r} has no keys of its own")
                target = target[section]
            if known is not None:
                raise ValueError(
                    f"{path!r} is a section; set one of its keys, such as {path}.{next(iter(known.model_fields))}"
                )
            target[key] = read_value(value) if isinstance(value, str) else value
        return type(self).parse(values)

    def to_yaml(self) -> str:
        """The whole recipe; `read` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def essence(self) -> dict[str, Any]:
        """All values on which a result depends: where the data lies and how it is fetched do not count."""
        values = self.model_dump(mode="json", exclude={"data": {"root", "workers", "eval_batch_size"}})
        for section, keys in _ADDED.items():
            fields = type(getattr(self, section)).model_fields
            for key in keys:
                if getattr(getattr(self, section), key) == fields[key].default:
                    del values[section][key]
        return {section: keys for section, keys in values.items() if keys}

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the recipe's `essence`."""
        text = json.dumps(self.essence(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: ``lr`` scaled from ``lr_batch`` to the images of one step."""
        ratio = self.data.batch_size * self.data.accumulate * self.train.devices / self.optim.lr_batch
        exponent = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.optim.lr_scaling]
        return self.optim.lr * math.pow(ratio, exponent)


def read_value(text: str) -> Any:
    """A value as YAML reads it, and numbers such as ``1e-3``, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"cannot read the value {text!r}") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `ValueError` says what is wrong with another file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections with keys, such as 'model: {{name: resnet8}}'")
    return values


def explain(error: ValidationError, top: type[BaseModel]) -> str:
    """One line for all that pydantic found."""
    return "; ".join(
        _explain_one(item["loc"], item["type"], item["msg"], item["input"], top) for item in error.errors()
    )


def _explain_one(place: Iterable[int | str], kind: str, message: str, got: Any, top: type[BaseModel]) -> str:
    path = [str(step) for step in place]
    if not path and kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        model: type[BaseModel] = top
        for step in path[:-1]:
            annotation = model.model_fields[step].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
        return str(unknown("key", path[-1], model.model_fields, where=f" in {'.'.join(path[:-1]) or 'the recipe'}"))
    return f"{'.'.join(path)}: {message[0].lower()}{message[1:]}, got {got!r}"
