"""The plug-in for LLaMA-Factory, which takes none by itself: its training, with a `ReversibleCallback`.

Example:
    python -m meft.integrations.llamafactory train.yaml
    torchrun --nproc_per_node 8 -m meft.integrations.llamafactory train.yaml learning_rate=1e-4

The file is LLaMA-Factory's own; options of `make_reversible` may stand in it under `meft`:

    meft:
      gamma: 0.03125
"""

from __future__ import annotations

from typing import Any

from meft.errors import ConfigError


def main() -> None:
    """Reads the command line as `llamafactory-cli train` does, and trains."""
    from llamafactory.hparams.parser import read_args
    from llamafactory.train.tuner import run_exp

    from .environment import options_given
    from .reversible import ReversibleCallback

    arguments: Any = read_args()
    options = options_given()
    if isinstance(arguments, dict):
        given = arguments.pop("meft", None) or {}
        if not isinstance(given, dict):
            raise ConfigError(
                f"meft: {given!r} in the arguments is no mapping. Valid: the options of make_reversible by name, "
                "as gamma: 0.03125 on a line of its own below meft:."
            )
        options |= given
    run_exp(arguments, callbacks=[ReversibleCallback(**options)])


if __name__ == "__main__":
    main()
