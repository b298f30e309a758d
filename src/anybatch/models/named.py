"""A network by a text: of the registry, timm or torchvision, of a Python file, or stored in a folder or on the Hub."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from anybatch.methods.parameters import shapeless
from anybatch.models import hub
from anybatch.models.network import Network
from anybatch.models.registry import create_network, list_models
from anybatch.models.weights import load_weights, read_weights
from anybatch.suggest import listed, one_line, unknown

Task = Literal["classification", "segmentation", "detection", "video", "features", "unknown"]
TIMM, TORCHVISION = "timm:", "torchvision:"
FORMS = (
    "a network's name (anybatch list --models), timm:NAME, torchvision:NAME, FILE.py:FUNCTION, a folder that anybatch "
    "train or save_pretrained wrote, or hf-hub:SOMEONE/SOMETHING"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a network; None or empty where nothing is."""

    name: str
    """The text that named it."""
    task: Task
    """What it gives: ``"features"`` for a network without classes, ``"unknown"`` for one of a Python file."""
    input_size: tuple[int, ...] | None = None
    """(C, H, W), or (C, T, H, W) of video, which it is meant for. Detectors take lists of such images."""
    classes: tuple[str, ...] = ()
    """Their names, or numbers where they have no names."""
    mean: tuple[float, ...] | None = None
    """Of each channel, on the scale 0 to 1; None also where images come normalized, or the network does it."""
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    """Images are resized to ``size / crop_pct`` before their center is cut out."""
    architecture: str = ""
    """The name that `anybatch.models.create_model` builds it by, with its ``scheme``; empty for others."""
    scheme: str = ""
    recipe: dict[str, Any] | None = None
    """Of the run that trained it."""
    trained: bool = False
    """Whether its weights were read, and not drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Named(Facts):
    """A network and what is known of it."""

    model: nn.Module
    """In evaluation mode on the CPU, as `model_named` gives it."""


def model_named(
    text: str | Path,
    *,
    scheme: str | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    **options: Any,
) -> Named:
    """The network that a text names. Nothing is downloaded but what ``hf-hub:`` asks for.

    A name of the registry comes before a folder of that name, which ``./name`` means.

    Args:
        text: ``"nf_resnet50"``, a name of `list_models`; ``"timm:NAME"``; ``"torchvision:NAME"``, of classification,
            detection, segmentation or video; ``"path/to/file.py:function"``, whose function of no arguments returns
            a module, and which is run; a folder that ``anybatch train`` or `Network.save_pretrained` wrote, or the
            ``model.safetensors`` in it; or ``"hf-hub:someone/something"``.
        scheme: How a network of the registry normalizes; None for its own.
        weights: A file that `load_weights` reads; for networks of others, their own state dict.
        num_classes: Of a network that is built; None for the default there.
        in_chans: The same, of a network of the registry or timm.
        **options: What else its builder takes.

    Returns:
        The network in evaluation mode, and what is known of it.

    Raises:
        ValueError: If there is no such network, which names the nearest; if an argument does not go with it; if a
            Python file fails, has no such function, or that returns no module; if weights or a folder are damaged or
            another network's.
        ImportError: If timm or huggingface_hub is needed and missing.

    >>> found = model_named("resnet8", scheme="gn:4")
    >>> found.task, found.input_size, found.scheme, found.trained
    ('classification', (3, 32, 32), 'gn(groups=4)', False)
    """
    given = {"scheme": scheme, "num_classes": num_classes, "in_chans": in_chans}
    asked = {name: value for name, value in given.items() if value is not None} | options
    name = str(text)
    build: Callable[..., Named]
    if name.startswith(TIMM):
        build, takes = _of_timm, None
    elif name.startswith(TORCHVISION):
        build, takes = _of_torchvision, None
    elif name.endswith(".py") or ".py:" in name:
        build, takes = _of_file, ()
    elif name in list_models():
        return _of_registry(name, scheme, weights, asked)
    elif not (name.startswith(hub.ON_HUB) or Path(name).exists() or "/" in name):
        raise ValueError(f"{unknown('model', name, list_models())}; a model is {FORMS}")
    else:
        build, takes = stored, ()
        if weights is not None:
            raise ValueError(f"weights={str(weights)!r} goes with a network that is built; {name} is no name of one")
    wrong = [key for key in asked if key == "scheme" or takes == ()]
    if wrong:
        what = "a network of anybatch list --models" if wrong == ["scheme"] else "a network that is built by its name"
        raise ValueError(f"{wrong[0]}={asked[wrong[0]]!r} goes with {what}, not with {name}")
    found = build(name, **asked)
    found.model.eval()
    return found if weights is None else _filled(found, weights)


def stored(text: str | Path) -> Named:
    """The trained network in a folder, beside a ``model.safetensors``, or on the Hub; errors are `model_named`'s."""
    name, path = str(text), Path(text)
    folder = path.parent if path.name == hub.WEIGHTS else path
    if name.startswith(hub.ON_HUB) or (folder / hub.CONFIG).is_file():
        model = Network.from_pretrained(name if name.startswith(hub.ON_HUB) else folder)
        return described(model, name, trained=True)
    if path.suffix in (".onnx", ".pt2"):
        raise ValueError(f"{name} is an exported network, which anybatch predict runs; give one that it was made from")
    if path.is_file() and path.name != hub.WEIGHTS:
        from anybatch.convert.saved import is_converted, load_converted  # which build on this module

        if is_converted(path):
            return load_converted(path)
        raise ValueError(f"{name} is a file, not a network; weights go beside a network's name, as weights={name!r}")
    from anybatch import checkpoint  # which reads runs, and comes behind models

    model, facts = checkpoint.load_model(folder)
    normalized = not any(facts.mean) and facts.recipe["data"].get("normalize") is None
    return Named(
        model=model,
        name=name,
        task="classification",
        input_size=(facts.in_chans, facts.size, facts.size),
        classes=tuple(facts.classes),
        mean=None if normalized else tuple(facts.mean),
        std=None if normalized else tuple(facts.std),
        architecture=model.default_cfg["architecture"],
        scheme=model.default_cfg["scheme"],
        recipe=facts.recipe,
        trained=True,
    )


def described(model: nn.Module, name: str = "", *, trained: bool = False) -> Named:
    """A network with what it tells of itself, which one of `create_model` does."""
    if not isinstance(model, Network) or not hasattr(model, "default_cfg"):
        return Named(model=model, name=name or type(model).__name__, task="unknown", trained=trained)
    cfg = model.default_cfg
    return Named(
        model=model,
        name=name or cfg["architecture"],
        task="segmentation" if model.dense else "classification" if model.num_classes else "features",
        input_size=tuple(cfg["input_size"]),
        classes=_numbered(model.num_classes),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        architecture=cfg["architecture"],
        scheme=cfg["scheme"],
        trained=trained,
    )


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(classes))


def _of_registry(name: str, scheme: str | None, weights: str | Path | None, asked: dict[str, Any]) -> Named:
    options = {key: value for key, value in asked.items() if key not in ("scheme", "num_classes", "in_chans")}
    classes, chans = asked.get("num_classes"), asked.get("in_chans")
    model = create_network(
        name,
        scheme,
        options,
        num_classes=1000 if classes is None else classes,
        in_chans=3 if chans is None else chans,
    )
    if weights is not None:
        load_weights(model, weights, classifier="adapt" if classes is None else "load")
    return described(model.eval(), name, trained=weights is not None)


def _of_timm(text: str, **asked: Any) -> Named:
    try:
        import timm
    except ImportError:
        raise ImportError(f"{text} needs timm: pip install 'anybatch[timm]'") from None
    name = text.removeprefix(TIMM)
    if not timm.is_model(name):
        raise unknown("model of timm", name, timm.list_models())
    model = _built(text, timm.create_model, name, pretrained=False, **asked)
    cfg, classes = model.default_cfg, int(getattr(model, "num_classes", 0))
    chans = asked.get("in_chans", cfg["input_size"][0])
    return Named(
        model=model,
        name=text,
        task="classification" if classes else "features",
        input_size=(chans, *cfg["input_size"][1:]),
        classes=_numbered(classes),
        mean=tuple(cfg["mean"]) if len(cfg["mean"]) == chans else None,
        std=tuple(cfg["std"]) if len(cfg["std"]) == chans else None,
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
    )


_TASKS: dict[str, Task] = {"segmentation": "segmentation", "detection": "detection", "video": "video"}


def _of_torchvision(text: str, **asked: Any) -> Named:
    from torchvision import models

    name = text.removeprefix(TORCHVISION)
    if name not in models.list_models():
        raise unknown("model of torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    # Detectors and segmenters download their backbone unless told otherwise.
    own: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        own["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        own["init_weights"] = True  # which they warn of where it is not said
    model = _built(text, models.get_model, name, **own, **asked)
    part = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    task: Task = "unknown" if part == "optical_flow" else _TASKS.get(part, "classification")
    known = next(iter(models.get_model_weights(name)))
    meant = known.transforms()
    size, resized = (getattr(meant, key, None) for key in ("crop_size", "resize_size"))
    side = [] if size is None and resized is None else list(size or resized)  # pyright: ignore[reportArgumentType]
    side = side * 2 if len(side) == 1 else side
    clip = [16 if known.meta.get("min_temporal_size") is None else max(16, known.meta["min_temporal_size"])]
    categories = known.meta.get("categories", ())
    classes = asked.get("num_classes", len(categories))
    mean, std = (getattr(meant, key, None) for key in ("mean", "std"))
    meant_for = (
        (3, *(clip if task == "video" else []), *side) if side else (3, 320, 320) if task == "detection" else None
    )
    return Named(
        model=model,
        name=text,
        task=task,
        input_size=meant_for,
        classes=tuple(categories) if classes == len(categories) else _numbered(classes),
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        interpolation=getattr(getattr(meant, "interpolation", None), "value", "bilinear"),
        crop_pct=side[0] / resized[0] if size and resized else 1.0,
    )


def _built(text: str, build: Callable[..., nn.Module], name: str, **arguments: Any) -> Any:
    """What another library builds; what it raises tells of arguments that it does not take."""
    try:
        return build(name, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{text} cannot be built: {' '.join(str(error).split()) or type(error).__name__}") from None


def _of_file(text: str) -> Named:
    where, _, function = text.rpartition(":")
    if not where.endswith(".py"):
        raise ValueError(f"{text} names a file and no function in it; write {text}:FUNCTION")
    path = Path(where)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    spec = importlib.util.spec_from_file_location(f"_anybatch_model_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be run as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and copies look for their classes
    with _beside(path), _told(f"{path} cannot be run", path):
        spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if made is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown("function", function, own, where=f" in {path}")
    if not callable(made):
        raise ValueError(f"{function} in {path} is a {type(made).__name__}, and must be a function of no arguments")
    with _beside(path), _told(f"{text} must be a function of no arguments that returns a module, and failed", path):
        model = made()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} returned a {type(model).__name__}, and must return a torch.nn.Module")
    if shapeless(model):
        raise ValueError(f"{text} returned a module whose layers have no shape yet; call it once in {function}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{text} returned a module on the meta device, without values")
    return described(model, text)


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Within this context a file may import those beside it, as one that Python runs."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Whatever a user's file raises becomes one line with the place in that file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.resolve())
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        said = error.msg if isinstance(error, SyntaxError) else one_line(error)
        place = "" if line is None else f" in line {line}"
        raise ValueError(f"{what}{place}: {type(error).__name__}: {said}") from None


def _filled(found: Named, weights: str | Path) -> Named:
    """With another library's weights: all of its state dict, and nothing else."""
    read, own = read_weights(weights), found.model.state_dict()
    differing = {key: (read[key].shape, own[key].shape) for key in own if key in read}
    differing = {key: (theirs, ours) for key, (theirs, ours) in differing.items() if theirs != ours}
    faults = {
        "missing": [key for key in own if key not in read and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in read if key not in own],
        "of another shape": [f"{key} {tuple(theirs)} for {tuple(ours)}" for key, (theirs, ours) in differing.items()],
    }
    told = "; ".join(f"{what}: {listed(keys)}" for what, keys in faults.items() if keys)
    if told:
        rows = {theirs[:1] if theirs[1:] == ours[1:] else () for theirs, ours in differing.values()}
        last = differing.keys() <= {*list(own)[-2:]} and not (faults["missing"] or faults["unexpected"])
        classes = rows.pop() if last and len(rows) == 1 else ()  # of the classifier, where it alone differs
        hint = f"; for {classes[0]} classes give num_classes={classes[0]} (--num-classes)" if classes else ""
        raise ValueError(f"{weights} holds another network's weights than {found.name}; {told}{hint}")
    found.model.load_state_dict(read, strict=False)
    return replace(found, trained=True)
