"""The catalogue: every family that `meft families` tries by itself, with what its tiny model needs.

Most rows name a model type and nothing else; sizes follow from the rules of `shrink`. A row that changes more says
why, or its values do. Families that are expected to be refused stand here like all others: what the library does with
them is found out, not written down.
"""

from __future__ import annotations

from ..family import Family
from .decoders import DECODERS
from .encoders import ENCODERS
from .mixed import MULTIMODAL
from .unusual import UNUSUAL
from .vision_and_audio import AUDIO, VISION

CATALOGUE: dict[str, Family] = {
    family.name: family for family in (*ENCODERS, *DECODERS, *VISION, *AUDIO, *MULTIMODAL, *UNUSUAL)
}
"""Every family by the name of its row."""

__all__ = ["CATALOGUE"]
