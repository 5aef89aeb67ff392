"""Every family of the catalogue under every coupling, and every head of it.

The checks themselves are `meft_lab.families.check`, which `test_check.py` sees failing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.check import FULL, WAYS, Subject, Verdict, check, check_head
from meft_lab.families.matrix import HEAD_WAYS, quiet
from support.expected_families import IDLE, OLD_PLAIN_CACHE_DIFFERS, PLAIN_CACHE_DIFFERS, PLAIN_LOADING_DIFFERS, REFUSED

# Transformers before 5.23 lacks some of them.
KNOWN = [name for name, family in CATALOGUE.items() if family.model_type in CONFIG_MAPPING]
PROMISED = (
    "bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "bart", "mbart", "t5", "opt", "gpt2",
    "gpt_neox", "gptj", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3",
    "falcon", "olmo2", "granite", "vit", "deit", "dinov2", "clip", "siglip", "whisper", "llava",
)  # fmt: skip
"""Model types that are tested with every change in each of `QUICK_WAYS`; of the others, one way and every refusal.

The ways that are marked slow differ from `meft1` in arithmetic alone, which knows no family.
"""
QUICK_WAYS = ("meft1", "meft3", FULL)
LOADING_NOTE = "The plain model, too, comes back with other weights."
NOTE = "The plain model, too, generates other words with a cache than without."


@pytest.fixture(autouse=True)
def without_reports() -> Iterator[None]:
    with quiet():
        yield


def cell(name: str, way: str) -> Any:
    refused = REFUSED.get(name, {})
    first = next((one for one in HEAD_WAYS if one not in refused), None)
    quick = QUICK_WAYS if CATALOGUE[name].model_type in PROMISED else (first,)
    always = way in quick or way in refused
    return pytest.param(name, way, marks=() if always else pytest.mark.slow)


def heads(name: str) -> Any:
    return pytest.param(name, marks=() if CATALOGUE[name].model_type in PROMISED else pytest.mark.slow)


@cache
def subject(name: str) -> Subject:
    return Subject.make(CATALOGUE[name])


@pytest.mark.parametrize(("name", "way"), [cell(name, way) for name in KNOWN for way in WAYS])
def test_coupling(name: str, way: str) -> None:
    """A training step, exact reconstruction, gradients, generation, saving; or a refusal with its reason."""
    found = check(subject(name), way)
    words = REFUSED.get(name, {}).get(way)
    if words is None:
        assert found.state == "works", found.detail
        if name not in OLD_PLAIN_CACHE_DIFFERS:
            loading = LOADING_NOTE if name in PLAIN_LOADING_DIFFERS and way == FULL else ""
            assert found.detail == (NOTE if name in PLAIN_CACHE_DIFFERS else loading)
    else:
        assert found.state == "refused"
        assert [part for part in words if part not in found.detail] == [], found.detail


@pytest.mark.parametrize("name", [heads(name) for name in KNOWN])
def test_heads(name: str) -> None:
    """A training step of every other head that Transformers has, under adapters and under full fine-tuning."""
    family, refused = CATALOGUE[name], REFUSED.get(name, {})
    ways = [way for way in HEAD_WAYS if way not in refused]
    for head in family.heads()[1:] if ways else ():
        made = Subject.make(family, head)
        for way in ways:
            assert check_head(made, way) == Verdict("works"), (head, way)


@pytest.mark.parametrize("name", [name for name in KNOWN if FULL not in REFUSED.get(name, {})])
def test_the_batch_reaches_every_stack(name: str) -> None:
    assert subject(name).idle == IDLE.get(name, ())


@pytest.mark.parametrize("name", KNOWN)
def test_models_are_tiny(name: str) -> None:
    assert sum(parameter.numel() for parameter in subject(name).base.parameters()) < 1e6


def test_the_lists_of_expectations_name_families_of_the_catalogue() -> None:
    assert {*REFUSED, *IDLE, *PLAIN_CACHE_DIFFERS} <= CATALOGUE.keys()


def test_the_catalogue_holds_the_families_that_were_promised() -> None:
    types = {family.model_type for family in CATALOGUE.values()}
    assert set(PROMISED) <= types
    assert len(types) >= len(PROMISED) + 20
