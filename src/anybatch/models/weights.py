"""Weights from elsewhere into a network of ours, and ours for use elsewhere."""

from __future__ import annotations

import itertools
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anybatch.methods.batch_channel_norm import EstimatedStatistics
from anybatch.models.counts import counts
from anybatch.models.layouts import LAYOUTS, SAME_OUTPUTS, Layout, Table
from anybatch.models.network import Network
from anybatch.models.registry import create_model, list_models, model_entry
from anybatch.suggest import listed, one_line, unknown

Source = str | Path | Mapping[str, Any]
Classifier = Literal["load", "skip", "adapt"]

_SET_BY_THE_LAYERS = ("weight_gamma", "weight_beta", "num_batches_tracked")
"""Buffers that a layer sets where a state dict lacks them."""
_NO_PARAMETER = ("running_mean", "running_var", *_SET_BY_THE_LAYERS)
_WITHIN = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model_state", "model")
_PLAIN = (
    "numpy.savez('plain.npz', **{f'{module}/{name}': value for module, values in tree.items() "
    "for name, value in values.items()})"
)


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did."""

    layout: str
    """A key of `LAYOUTS`."""
    mapped: dict[str, str]
    """Names in the source, by ours."""
    missing: list[str]
    """Names of ours that kept their values."""
    unused: list[str]
    """Names in the source that were not used."""
    note: str
    """What the network must be built with to compute the same as there; empty where nothing is known."""


def load_weights(
    model: Network, source: Source, *, layout: str = "auto", strict: bool = True, classifier: Classifier = "load"
) -> Loaded:
    """Copy weights that another library, a release or this one wrote into a network, in place.

    Args:
        model: The network, built for the weights: `Loaded.note` tells with which scheme and options it computes what
            they were trained for, which the weights themselves do not show.
        source: A ``.safetensors`` file, an ``.npz`` of plain arrays, a ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or
            ``.tar`` that ``torch.load(weights_only=True)`` reads, or a state dict, also a nested one. Of several state
            dicts in one file averaged weights come first, as in timm. A word in front of all names is left out, such
            as ``model.`` of Lightning.
        layout: How the source names things: a key of `anybatch.models.layouts.LAYOUTS`, ``"anybatch"``,
            ``"torchvision"``, ``"timm"``, ``"knresnet"``, ``"ws"``, ``"mmcv"``, ``"deepmind"`` or ``"bit"``;
            ``"auto"`` for the one that shares the most names and shapes with the network. The WS release and mmcv
            have names that are ours too: give ``"ws"`` or ``"mmcv"`` for a `Loaded.note`.
        strict: Whether every tensor of the network must be there in its shape, and no other; otherwise what fits is
            taken.
        classifier: ``"load"``; ``"skip"`` keeps the network's own; ``"adapt"`` first gives the network as many
            classes as the source has. A network with ``num_classes=0`` skips it.

    Returns:
        What was copied from where, and what was not.

    Raises:
        TypeError: If the model is no `Network`, such as a feature pyramid: load first, then make it one.
        ValueError: If the file is missing, damaged, of an unknown kind or would have to run code to be read; if the
            weights are another network's, with at most ten names of each kind; if they have another number of classes
            or of input channels.
            The network is unchanged then, but for the number of its classes with ``"adapt"``.

    >>> model, like = create_model("resnet8", num_classes=2), create_model("resnet8", num_classes=2)
    >>> load_weights(model, like.state_dict()).layout
    'anybatch'
    """
    if not isinstance(model, Network):
        raise TypeError(f"model must be a network of create_model, got {type(model).__name__}")
    if classifier not in ("load", "skip", "adapt"):
        raise ValueError(f"classifier must be 'load', 'skip' or 'adapt', got {classifier!r}")
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    named = read_weights(source)
    prefix = _shared_prefix(named, model)
    weights = {key.removeprefix(prefix): tensor for key, tensor in named.items()}
    name = _recognized(model, weights) if layout == "auto" else layout
    if name not in LAYOUTS:
        raise unknown("layout", name, ("auto", *LAYOUTS))
    fit = _Fit(model, weights, LAYOUTS[name])

    head = [f"{model.classifier_name}.{kind}" for kind in ("weight", "bias")]
    classes = len(fit.found[head[0]]) if head[0] in fit.found and fit.found[head[0]].dim() else None
    if classifier == "adapt" and classes not in (None, model.num_classes):
        model.reset_classifier(classes)
        fit = _Fit(model, weights, LAYOUTS[name])
    if classifier == "skip" or not model.num_classes:
        for key in head:
            fit.skip(key)
    elif classes not in (None, model.num_classes) and strict and not fit.misfits(head):
        raise ValueError(
            f"{where} tells {classes} classes apart, the network {model.num_classes}; build it with "
            f"num_classes={classes}, or keep its own classifier with classifier='skip'"
        )

    if strict and (chans := fit.other_channels()):
        raise ValueError(
            f"{where} takes images of {chans} channels, the network {model.in_chans}; build it with in_chans={chans}"
        )
    if strict and (told := fit.told()):
        hint = "; keep the network's own classifier with classifier='skip'" if fit.missing == head[::-1] else ""
        others = _others(model, weights, LAYOUTS[name])
        hint += f"; its weights fit {' or '.join(others)}" if others else ""
        raise ValueError(f"{where} holds another network's weights (read as layout {name!r}); {told}{hint}")
    # In place of strictness above: layers set the buffers that a checkpoint lacks.
    model.load_state_dict(fit.fitting, strict=False)
    _count_batches(model, fit.fitting)
    note = SAME_OUTPUTS.get((name, _family(model)), "")
    mapped = {key: prefix + fit.origin[key] for key in fit.fitting}
    missing = sorted(fit.own.keys() - mapped.keys())
    used = set(mapped.values())
    unused = [key for key in named if key not in used]
    return Loaded(name, mapped, missing, unused, note)


def export_weights(model: Network, layout: str = "timm") -> dict[str, Tensor]:
    """The network's state dict with another library's names and shapes.

    Whether the other network then computes the same depends on how ours was built; `SAME_OUTPUTS` in
    `anybatch.models.layouts` tells what it takes. With skip gains, as in its own scheme, an NF-ResNet or NF-RegNet has
    tensors that timm's lack: build it with ``skip_gain=None``.

    Args:
        model: The network.
        layout: ``"timm"`` or ``"torchvision"``.

    Returns:
        Tensors that share memory with the network's.

    Raises:
        TypeError: If the model is no `Network`.
        ValueError: If the layout is another, or there is no such network, as with CIFAR's stem.
    """
    if not isinstance(model, Network):
        raise TypeError(f"model must be a network of create_model, got {type(model).__name__}")
    if layout not in ("timm", "torchvision"):
        raise unknown("layout to export", layout, ("timm", "torchvision"))
    if not LAYOUTS[layout].knows(model):
        raise ValueError(
            f"{layout} has no network like this {_architecture(model)}; its weights travel under our own names, as a "
            "state_dict() or by save_pretrained"
        )
    table = LAYOUTS[layout].table(model)
    return {table.name(key): table.shaped(key, value) for key, value in model.state_dict().items()}


class _Fit:
    """Tensors of a source under our names: those of the right shape, and what is wrong with the others."""

    def __init__(self, model: Network, weights: Mapping[str, Tensor], layout: Layout) -> None:
        self.own = model.state_dict()
        self.in_chans = model.in_chans
        self.found: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}
        self.unexpected: list[str] = []
        self.table: Table = layout.table(model)
        # A classifier is recognized by a network that has none, too.
        ours = dict.fromkeys([*self.own, f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"])
        places = {self.table.name(key): key for key in ours}
        for name, tensor in weights.items():
            spelled = layout.spelled(name)
            key = places.get(spelled) if spelled else None
            if key is not None:
                self.found[key], self.origin[key] = layout.read(tensor), name
            elif spelled:
                self.unexpected.append(name)
        self._skipped: set[str] = set()

    def skip(self, key: str) -> None:
        self._skipped.add(key)
        self.found.pop(key, None)

    @property
    def fitting(self) -> dict[str, Tensor]:
        """Tensors in the shape of ours."""
        pairs = ((key, _reshaped(t, self.own[key])) for key, t in self.found.items() if key in self.own)
        return {key: t for key, t in pairs if t is not None}

    @property
    def missing(self) -> list[str]:
        lacking = self.own.keys() - self.found.keys() - self._skipped
        return sorted(key for key in lacking if not key.endswith(_SET_BY_THE_LAYERS))

    def misfits(self, apart_from: list[str]) -> bool:
        """Whether anything beside these is wrong."""
        wrong = (self.found.keys() & self.own.keys()) - self.fitting.keys()
        return bool(self.missing or self.unexpected or wrong - set(apart_from))

    def other_channels(self) -> int | None:
        """How many channels its images have, if that is all in which its network differs."""
        wrong = (self.found.keys() & self.own.keys()) - self.fitting.keys()
        if self.missing or self.unexpected or len(wrong) != 1:
            return None
        key = wrong.pop()
        theirs, ours = self.found[key].shape, self.own[key].shape
        stem = len(theirs) == len(ours) == 4 and ours[1] == self.in_chans != theirs[1]
        return theirs[1] if stem and (theirs[0], theirs[2:]) == (ours[0], ours[2:]) else None

    def score(self) -> tuple[int, int, int]:
        """How well the layout explains the source."""
        common = self.found.keys() & self.own.keys()
        exact = sum(self.table.shaped(key, self.own[key]).shape == self.found[key].shape for key in common)
        return exact, len(self.found), -len(self.unexpected)

    def told(self) -> str:
        """What is wrong in a line, empty if nothing is."""
        wrong = sorted((self.found.keys() & self.own.keys()) - self.fitting.keys())
        kinds = [key for key in wrong if _other_kind(self.found[key], self.own[key])]
        shapes = [key for key in wrong if key not in kinds]
        faults = {
            "missing": self.missing,
            "unexpected": sorted(self.unexpected),
            "of another shape": [
                f"{key} {tuple(self.found[key].shape)} for {tuple(self.own[key].shape)}" for key in shapes
            ],
            "no floating point": [f"{key} {self.found[key].dtype}" for key in kinds],
        }
        return "; ".join(f"{what}: {listed(keys)}" for what, keys in faults.items() if keys)


def _other_kind(tensor: Tensor, own: Tensor) -> bool:
    """Whether it has whole, complex or logical numbers for floating point ones."""
    return own.is_floating_point() and not tensor.is_floating_point()


def _reshaped(tensor: Tensor, own: Tensor) -> Tensor | None:
    """The tensor in the shape of ours, where they differ by dimensions of size 1 or by flattened inputs of a filter."""
    shape = own.shape
    if _other_kind(tensor, own):
        return None
    if tensor.shape == shape:
        return tensor
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    flat = len(shape) == 2 and tensor.dim() > 2 and tensor.flatten(1).shape == shape
    return tensor.reshape(shape) if same or flat else None


def _recognized(model: Network, weights: Mapping[str, Tensor]) -> str:
    """The layout that shares the most with the network; of equals the first in the table."""
    known = [name for name, layout in LAYOUTS.items() if layout.knows(model)]
    return max(known, key=lambda name: _Fit(model, weights, LAYOUTS[name]).score())


def _shared_prefix(weights: Mapping[str, Tensor], model: Network) -> str:
    """Words that stand in front of all names, with their dots, as wrappers put them there; none of ours begins so."""
    own = {key.partition(".")[0] for key in model.state_dict()}
    columns = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    shared = itertools.takewhile(lambda words: len(set(words)) == 1 and words[0] not in own, columns)
    return "".join(f"{words[0]}." for words in shared)


def _count_batches(model: Network, weights: Mapping[str, Tensor]) -> None:
    """Estimates that were trained elsewhere are behind their warm start, which the release does not count."""
    for name, module in model.named_modules():
        counter = f"{name}.num_batches_tracked"
        if isinstance(module, EstimatedStatistics) and f"{name}.running_mean" in weights and counter not in weights:
            module.num_batches_tracked.fill_(1_000_000)


def _family(model: Network) -> str:
    return model_entry(model.default_cfg["architecture"]).family if hasattr(model, "default_cfg") else ""


def _architecture(model: Network) -> str:
    return model.default_cfg["architecture"] if hasattr(model, "default_cfg") else type(model).__name__


_HEAD = re.compile(
    r"^(head\.fc|fc|classifier|classifier\.[26]|\w+/~/linear|\w+\.linear|resnet/head/conv2d)[./](b|bias|w|weight|kernel)$"
)


def _others(model: Network, weights: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """Registered networks whose tensors these are: of the three nearest in size, those that fit entirely."""
    head = [t.numel() for name, t in weights.items() if _HEAD.match(name)]
    classes = min(head) if len(head) == 2 else 0  # of weight and bias
    values = sum(t.numel() for name, t in weights.items() if not name.endswith(_NO_PARAMETER))
    if classes:  # the size that is known of each network is that with 1000 classes
        values += sum(head) // classes * (1000 - classes)

    def distance(name: str) -> float:
        return abs(counts()[name]["parameters"] - values)

    if not hasattr(model, "default_cfg"):
        return []
    near = sorted((name for name in list_models() if name in counts()), key=distance)[:3]
    fitting = []
    for name in near:
        schemes = dict.fromkeys((model.default_cfg["scheme"], "bn", model_entry(name).scheme))
        for scheme in schemes:
            try:
                with torch.device("meta"):
                    made: Any = create_model(name, scheme, num_classes=classes, in_chans=model.in_chans)
            except ValueError:  # a scheme that does not fit the widths
                continue
            if not _Fit(made, weights, layout).told():
                fitting.append(f"{name} with scheme {scheme}")
                break
    return fitting


def read_weights(source: Source) -> dict[str, Tensor]:
    """The tensors of a file or a mapping by name, on the CPU; see `load_weights`.

    Nested mappings, such as haiku's parameters, become flat, names joined by ``/``. What is no tensor is left out.
    """
    tree = source if isinstance(source, Mapping) else _read_file(Path(source))
    for name in _WITHIN:
        if isinstance(inner := tree.get(name), Mapping):
            tree = inner
            break
    found = dict(_flat(tree))
    if not found:
        where = "the mapping" if isinstance(source, Mapping) else source
        raise ValueError(f"{where} holds no tensors")
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, np.ndarray | np.generic):
            try:
                yield f"{prefix}{name}", torch.from_numpy(np.array(value))
            except TypeError as error:
                raise ValueError(f"array {prefix}{name}: {error}; store it as float32") from None


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"no file of weights at {path}")
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path} is of unknown kind {kind!r}; give one of {', '.join(_READERS)}")
    try:
        held = _held(path)
        other = held not in (None, kind if kind in (".safetensors", ".npz") else ".pt")
        read = {} if other else _READERS[kind](path)
    except _HoldsObjectsError:
        raise _refused(path) from None
    except PermissionError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # what reads a damaged file raises whatever it stumbles over
        told = one_line(error, 150)
        raise ValueError(f"{path} is damaged or cut off, or no {kind} file: {type(error).__name__} {told}") from None
    if other:
        raise ValueError(f"{path} holds what a {held} file holds; give its name that ending")
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} holds a {type(read).__name__} and no named tensors")
    return read


class _HoldsObjectsError(Exception):
    """A file holds what only running code brings back."""


def _held(path: Path) -> str | None:
    """The ending that a file should have by its content, None where that does not tell."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[5:] == b"\0\0\0{":  # a length of 8 bytes, and JSON
        return ".safetensors"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        endings = {name.rpartition("/")[2].rpartition(".")[2] for name in archive.namelist()}
    return ".pt" if "pkl" in endings else ".npz" if "npy" in endings else None


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file  # here, so that who uses the layers alone does not load it

    return load_file(path)


def _read_npz(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
        if start[:1] == pickle.PROTO:
            raise _HoldsObjectsError
        if start not in (b"PK", b"\x93N"):  # of which numpy says that they are pickled
            raise ValueError("it does not begin as numpy's files do")
        file.seek(0)
        try:
            arrays = np.load(file, allow_pickle=False)
            return dict(arrays) if isinstance(arrays, Mapping) else arrays
        except ValueError as error:
            if "Object arrays" in str(error):
                raise _HoldsObjectsError from None
            raise


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("GLOBAL|allowlisted|unrecognized function", str(error)):
            raise _HoldsObjectsError from None
        raise ValueError("it is no pickle that torch.save writes") from None


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".ckpt": _read_torch,
    ".bin": _read_torch,
    ".tar": _read_torch,
}


def _refused(path: Path) -> ValueError:
    advice = f"write {_PLAIN}" if path.suffix.lower() == ".npz" else "save model.state_dict() alone"
    return ValueError(
        f"{path} holds pickled objects, and reading them would run whatever code stands in the file; open it where it "
        f"is trusted and {advice}, or take the same weights as .safetensors"
    )
