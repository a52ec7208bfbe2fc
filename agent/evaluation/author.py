"""What only the author knows, for the cards: a small TOML file whose answers are told word for word."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent import config
from agent.errors import ConfigError


class ModelCardText(config.Section, frozen=True, kw_only=True):
    """Section [card]: of the model, after Mitchell et al. 2019."""

    about: str = ""
    developed_by: str = ""
    contact: str = ""
    licence: str = ""
    citation: str = ""
    intended_use: str = ""
    intended_users: str = ""
    out_of_scope: str = ""
    training: str = ""
    factors: str = ""
    ethics: str = ""
    caveats: str = ""


class DataCardText(config.Section, frozen=True, kw_only=True):
    """Section [data]: of the data, after Gebru et al. 2021."""

    about: str = ""
    motivation: str = ""
    funded_by: str = ""
    instances: str = ""
    sampling: str = ""
    collection: str = ""
    consent: str = ""
    preprocessing: str = ""
    labelling: str = ""
    uses: str = ""
    not_for: str = ""
    distribution: str = ""
    licence: str = ""
    maintenance: str = ""


class CardTexts(config.Section, frozen=True, kw_only=True):
    card: ModelCardText = msgspec.field(default_factory=ModelCardText)
    data: DataCardText = msgspec.field(default_factory=DataCardText)


def read(file: Path) -> CardTexts:
    """Raises ConfigError."""
    if not file.is_file():
        raise ConfigError(str(file), "", "no such file; it is the TOML file with [card] and [data] for the cards")
    return config.read(file, CardTexts)
