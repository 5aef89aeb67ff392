"""The paper's questions, each one command: `meft study NAME` writes a table and a figure.

| study | question |
|---|---|
| `starting-point` | does a method have to start from the pretrained model? |
| `factors` | what do lam, beta and gamma cost in distance, stability and score? |
| `gradients` | how right are gradients with rebuilt activations, by arithmetic and dtype? |
| `initialisation` | how should adapters start? |
| `reversibility` | what do frozen and cached layers change in memory, time and score? |
| `depth` | how do memory, time and exactness go with depth? |
| `encoder-decoder` | do BART and T5 work alike? |
| `precision` | what does each dtype cost and score? |
"""

from __future__ import annotations

from . import depth, encoder_decoder, factors, gradients, initialisation, precision, reversibility, starting_point
from .base import Study
from .runner import run_study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (starting_point, factors, gradients, initialisation, reversibility, depth, encoder_decoder, precision)
}
"""All studies by name."""

__all__ = ["STUDIES", "Study", "run_study"]
