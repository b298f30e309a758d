"""What an exported file says of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import anybatch
from anybatch.models.named import Facts
from anybatch.models.preprocessing import check_images

KEY = "anybatch.card"
"""The key of an ONNX file's ``metadata_props``; a ``.pt2`` file has an extra file of this name."""


@dataclass(frozen=True, kw_only=True)
class Card(Facts):
    """What is known of an exported network, a JSON object with these keys under `KEY`."""

    version: str
    """Of anybatch, which wrote it."""
    dynamic_size: bool
    """Whether height and width are free, beside the batch; otherwise they are those of ``input_size``."""
    folded: int
    """Layers that `anybatch.convert.fold` folded."""

    @classmethod
    def of(cls, facts: Facts, **more: Any) -> Card:
        """The card of a network of which these facts are known."""
        known = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Facts)}
        return cls(**{**known, "version": anybatch.__version__, **more})

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """What `to_json` wrote; a `ValueError` says what is wrong with it."""
        try:
            held = json.loads(text)
            known = {field.name for field in dataclasses.fields(cls)}  # a later version may say more
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items() if k in known}
            card = cls(**values)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the card is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(card.classes, tuple) or not all(isinstance(name, str) for name in card.classes):
            raise ValueError(f"the card is damaged: classes must be texts, got {card.classes!r}")
        if card.task == "classification" and card.mean is not None:
            check_images(dataclasses.asdict(card))
        return card
