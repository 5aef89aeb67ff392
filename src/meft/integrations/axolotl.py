"""The plug-in for Axolotl.

Example:
    plugins:
      - meft.integrations.axolotl.MeftPlugin
    meft:
      gamma: 0.03125
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel


class MeftArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration: the options of `make_reversible` by name."""

    meft: dict[str, Any] | None = None


class MeftPlugin(BasePlugin):
    """Makes the model that Axolotl trains reversible, by a `ReversibleCallback` with the options under `meft`."""

    def get_input_args(self) -> str:
        return "meft.integrations.axolotl.MeftArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        from .reversible import ReversibleCallback

        return [ReversibleCallback(**dict(cfg.meft or {}))]
