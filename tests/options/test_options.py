"""The table of options, and all that is made from it."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

import meft
from meft.backbone.plan import Plan
from meft.cli.estimate import EstimateArguments
from meft.errors import ConfigError
from meft.methods.arguments import OptionArguments
from meft.methods.registry import apply_method, read_way
from meft.methods.table import MethodOptions
from meft.options import CONFIG, FUNCTION, METHOD, OPTIONS, options_of, reference_page
from meft.training import TRAIN_TYPES
from meft.training.arguments import MeftArguments, flat, parse
from support import models

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
SOURCE = Path(meft.__file__).parent
BASE = {"coupling": "momentum"}


def estimate_options(words: list[str]) -> dict[str, Any]:
    return parse((EstimateArguments, OptionArguments), ["m", *words], command="estimate")[1].given()


def typed(*words: str) -> MeftArguments:
    return parse(TRAIN_TYPES, ["--model_name_or_path=m", *words], command="train")[2]


# --- Adding one -------------------------------------------------------------------------------------------------------

# Appends an option to the table before anything is made from it, and looks for it everywhere.
_ADDED = """
import inspect, json, sys, types
from pathlib import Path
sys.path.insert(0, TESTS)
package = types.ModuleType("meft"); package.__path__ = [SOURCE]; sys.modules["meft"] = package
import meft.options.table as table
from meft.options.values import Integer
own = {"meft1": 3, "momentum": 5}
table.OPTIONS = (*table.OPTIONS, table.Option(
    "spice", Integer(1, 9), None, "How hot the streams are.", "plan", none="the coupling's own",
    own=lambda coupling, post_norm: own.get(coupling),
    before=lambda coupling: 2, methods=("meft1", "momentum"),
))
del sys.modules["meft"]
import meft
from peft import PeftModel, get_peft_model
from support import models
from meft.cli.estimate import EstimateArguments
from meft.methods.arguments import OptionArguments
from meft.cli.verify import VerifyArguments, _from_base
from meft.errors import ConfigError
from meft.methods.registry import read_way
from meft.methods.registry import apply_method
from meft.options import reference_page
from meft.backbone.plan import Plan
from meft_lab.sweep import Sweep, load_recipe
from meft.training import TRAIN_TYPES
from meft.loading.arguments import ModelArguments
from meft.training.arguments import MeftArguments, parse
from meft.backbone.discovery import find_stacks

def _options(words):
    return parse((EstimateArguments, OptionArguments), ["m", *words], command="estimate")[1].given()

def refused(call, text):
    try:
        call()
    except ConfigError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

folder, message = Path(sys.argv[1]), "spice=10 is out of range. Valid: an integer, 1 to 9 or None."
plan_of = lambda model: find_stacks(model)[0].layers[0].placement().reversible_stack.plan

assert "spice" in inspect.signature(meft.MeftConfig).parameters and "How hot" in meft.MeftConfig.__doc__
assert "spice" in inspect.signature(meft.make_reversible).parameters and "How hot" in meft.make_reversible.__doc__
assert (Plan.make(coupling="meft1").spice, Plan.make(coupling="momentum", spice=4).spice) == (3, 4)
assert Plan.make(coupling="meft1", spice=4).differences(Plan.make(coupling="meft1")) == "spice 3, not 4"
for call in (
    lambda: meft.MeftConfig(spice=10), lambda: Plan.make(coupling="meft1", spice=10),
    lambda: meft.make_reversible(models.build("bert"), spice=10),
    lambda: apply_method(models.build("bert"), "meft1", task_type="SEQ_CLS", spice=10),
    lambda: read_way("momentum", {"spice": 10}), lambda: _options(["--spice=10"]),
    lambda: parse(TRAIN_TYPES, ["--model_name_or_path=m", "--spice=10"], command="train"),
):
    refused(call, message)
refused(lambda: apply_method(models.build("bert"), "lora", task_type="SEQ_CLS", spice=4), "has no such option")
assert plan_of(meft.make_reversible(models.build("bert"), spice=4)).spice == 4

verify_types = (ModelArguments, MeftArguments, VerifyArguments)
for command, types_ in (("train", TRAIN_TYPES), ("verify", verify_types)):
    groups = parse(types_, ["--model_name_or_path=m", "--method=momentum", "--spice", "7"], command=command)
    arguments = groups[types_.index(MeftArguments)]
    model = _from_base(models.build("bert"), "SEQ_CLS", arguments, None)
    assert plan_of(model).spice == 7 and model.peft_config["default"].spice == 7
assert plan_of(_from_base(models.build("bert"), "SEQ_CLS", parse(
    (MeftArguments,), ["--method=lora", "--spice", "7"], command="verify")[0], None)).spice == 7
assert _options(["--spice", "7"]) == {"spice": 7}
assert plan_of(read_way("lora+momentum", {"spice": 7}).apply(models.build("bert"), "SEQ_CLS")).spice == 7

recipe = "arguments: {model_name_or_path: m, task: rte, spice: %d, use_cpu: true}\\ngrid: {method: [meft1]}\\n"
(folder / "r.yaml").write_text(recipe % 6)
assert load_recipe(str(folder / "r.yaml")).arguments["spice"] == 6
assert Sweep(load_recipe(str(folder / "r.yaml")), folder / "sweep").planned() == 1
(folder / "r.yaml").write_text(recipe % 10)
refused(lambda: Sweep(load_recipe(str(folder / "r.yaml")), folder / "sweep").planned(), message)

assert "## `spice`\\n\\nHow hot the streams are.\\n" in reference_page()
get_peft_model(models.build("bert"), meft.MeftConfig(task_type="SEQ_CLS")).save_pretrained(folder / "saved")
path = folder / "saved" / "adapter_config.json"
saved = json.loads(path.read_text())
assert saved["spice"] == 3, saved
assert PeftModel.from_pretrained(models.build("bert"), folder / "saved").peft_config["default"].spice == 3
del saved["spice"]
path.write_text(json.dumps(saved))
assert PeftModel.from_pretrained(models.build("bert"), folder / "saved").peft_config["default"].spice == 2
print("found everywhere")
"""


def test_an_option_added_to_the_table_is_everywhere(tmp_path: Path) -> None:
    code = f"TESTS, SOURCE = {str(Path(models.__file__).parents[1])!r}, {str(SOURCE)!r}\n{_ADDED}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "found everywhere", done.stderr


def test_the_page_is_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run: python -m meft.options docs/options.md"


def test_every_option_has_the_default_that_is_written() -> None:
    for reader, made in ((CONFIG, meft.MeftConfig), (FUNCTION, meft.make_reversible)):
        found = inspect.signature(made).parameters
        for name, option in options_of(reader).items():
            assert found[name].default == option.default, name
    for option in OPTIONS:
        option.check(option.default)
        assert option.help.endswith(".")


# --- From words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--tile_size", "none"], "tile_size", None),
        (["--tile_size=None"], "tile_size", None),
        (["--tile_size", "auto"], "tile_size", "auto"),
        (["--tile-size", "7"], "tile_size", 7),
        (["--fused_loss"], "fused_loss", True),
        (["--no_fused_loss"], "fused_loss", False),
        (["--no-fused-loss"], "fused_loss", False),
        (["--fused_loss", "false"], "fused_loss", False),
        (["--fused_loss=True"], "fused_loss", True),
        (["--gamma", "1/8"], "gamma", 0.125),
        (["--gamma", "none"], "gamma", None),
        (["--output", "newest"], "output", "newest"),
        (["--output", "sum:0.1"], "output", ("sum", 0.1)),
        (["--stacks", "a", "b"], "stacks", ("a", "b")),
        (["--stacks", "none"], "stacks", None),
        (["--drift_tolerance", "1e-3"], "drift_tolerance", 1e-3),
    ],
)
def test_words(words: list[str], name: str, value: Any) -> None:
    arguments = typed("--method=momentum", *words)
    json.dumps(flat(arguments), allow_nan=False)
    assert getattr(arguments.options(), name) == value
    found = estimate_options(words)[name]
    assert (tuple(found) if isinstance(found, list) else found) == value


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nfused_loss: false\ntile_size: none\noutput: [sum, 0.1]\nstacks: [a]\n")
    options = parse(TRAIN_TYPES, [str(path)], command="train")[2].options()
    assert (options.fused_loss, options.tile_size, options.output) == (False, None, ("sum", 0.1))
    assert options.stacks == ("a",)
    path.write_text("model_name_or_path: m\nno_fused_loss: true\ntile_size: null\n")
    options = parse(TRAIN_TYPES, [str(path)], command="train")[2].options()
    assert options.fused_loss is False and options.given().get("tile_size", "left out") == "left out"


def test_what_was_left_out_is_refused_beside_no_method() -> None:
    assert typed("--method=lora").options().given().keys() & options_of(FUNCTION).keys() == {
        name for name, option in options_of(METHOD).items() if not option.default and name in options_of(FUNCTION)
    }
    with pytest.raises(ConfigError, match="fused_loss is True, but method 'lora' has no such option; it belongs to"):
        apply_method(models.build("bert"), "lora", task_type="SEQ_CLS", fused_loss=True)


def test_none_reaches_the_plan_and_the_estimate() -> None:
    model = apply_method(models.build("bert"), "momentum", task_type="SEQ_CLS", tile_size=None, fused_loss=False)
    config = model.peft_config["default"]
    assert (config.tile_size, config.plan().tile_size, config.fused_loss) == (None, None, False)
    assert read_way("momentum", {"tile_size": None, "gamma": None}).options == {"tile_size": None}
    assert "tile_size=None" in read_way("meft3", {"tile_size": None}).code("CAUSAL_LM")


# --- Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("gamma", "1/4", "gamma='1/4' is a str. Valid: a number or None. Write gamma=0.25."),
        ("gamma", True, "gamma=True is a bool. Valid: a number or None."),
        ("gamma", Decimal("0.25"), "gamma=Decimal('0.25') is a Decimal. Valid: a number or None. Write gamma=0.25."),
        ("gamma", Fraction(1, 4), "is a Fraction. Valid: a number or None. Write gamma=0.25."),
        ("gamma", torch.tensor(0.25), "gamma=tensor(0.2500) is a Tensor. Valid: a number or None. Write gamma=0.25."),
        ("gamma", torch.ones(3, 100), "is a Tensor. Valid: a number or None."),
        ("gamma", np.float32(0.25), "is a float32. Valid: a number or None. Write gamma=0.25."),
        ("gamma", 10**400, "is out of range. Valid: a number or None."),
        ("gamma", "fast", "gamma='fast' is a str. Valid: a number or None."),
        ("tile_size", torch.tensor(4), "is a Tensor. Valid: an integer, at least 1 or 'auto' or None. Write tile_s"),
        (
            "tile_size",
            "8",
            "tile_size='8' is a str. Valid: an integer, at least 1 or 'auto' or None. Write tile_s",
        ),
        ("output", 5, "output=5 is no output rule. Valid:"),
        ("output", "", "output='' is no output rule. Valid:"),
        ("output", ("sum", True), "output=('sum', True) is no output rule. Valid:"),
        ("output", ("sum", float("nan")), "output=('sum', nan) is no output rule. Valid:"),
        ("output", torch.ones(2), "is no output rule. Valid:"),
        ("fused_loss", 1, "fused_loss=1 is a int. Valid: True or False."),
        ("fused_loss", None, "fused_loss=None is a NoneType. Valid: True or False."),
        (
            "stacks",
            "encoder",
            "stacks='encoder' is no list of names. Valid: a list of the stacks' names or None. W",
        ),
        ("stacks", [1], "stacks=[1] is no list of names."),
        ("granularity", None, "granularity=None is unknown. Valid: 'layer', 'block'."),
        ("sign", 1, "sign=1 is unknown. Valid: 'fixed', 'random'."),
        ("arithmetic", ["exact"], "arithmetic=['exact'] is unknown. Valid: 'exact', 'float'."),
        ("drift_tolerance", None, "drift_tolerance=None is a NoneType. Valid: a number from 0 up. Use 1e-2, say."),
        ("drift_tolerance", True, "drift_tolerance=True is a bool. Valid: a number from 0 up."),
        ("anchor_every", 2.0, "anchor_every=2.0 is a float. Valid: an integer, at least 1 or None."),
        ("coupling", None, "coupling=None is unknown. Valid: 'meft1',"),
        ("frozen_layers", True, "frozen_layers=True is a bool. Valid: an integer, at least 0."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_of_a_wrong_type(name: str, value: Any, text: str) -> None:
    """The same text from the configuration, `make_reversible` and the methods."""
    model = models.build("bert")
    calls = [lambda: meft.MeftConfig(**{**BASE, name: value}), lambda: meft.make_reversible(model, **{name: value})]
    # Where None is no value, it leaves an option of a method out.
    if name in options_of(METHOD) and value is not None:
        calls.append(lambda: MethodOptions(**{name: value}))
        calls.append(lambda: read_way("momentum", {name: value}))
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert text in str(caught.value)


@pytest.mark.parametrize("words", [["--gamma", "fast"], ["--fraction_bits=4.5"], ["--arithmetic=half"], ["--output=x"]])
def test_words_that_are_wrong(words: list[str]) -> None:
    name, _, value = "=".join(words)[2:].partition("=")
    with pytest.raises(ConfigError) as first:
        typed(*words)
    with pytest.raises(ConfigError) as second:
        estimate_options(words)
    read = options_of(METHOD)[name].read(value)
    with pytest.raises(ConfigError) as third:
        meft.MeftConfig(**{**BASE, name: read})
    assert str(first.value) == str(second.value) == str(third.value)


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match=r"make_reversible\(\) got an unexpected keyword argument 'gama'.* gamma, out"):
        meft.make_reversible(models.build("bert"), gama=0.25)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        meft.MeftConfig(gama=0.25)
    with pytest.raises(TypeError, match=r"Plan.make\(\) got an unexpected keyword argument 'gama'. Valid: .*gamma,"):
        Plan.make(coupling="momentum", gama=0.25)
    with pytest.raises(TypeError, match=r"make_reversible\(\) too many positional arguments"):
        meft.make_reversible(models.build("bert"), "momentum", 0.25)


# --- Saved ------------------------------------------------------------------------------------------------------------

# What version 0.1.0 wrote.
_SAVED: dict[str, Any] = {
    "anchor_every": None,
    "arithmetic": "exact",
    "auto_mapping": None,
    "backward": "reversible",
    "base_layers": [{"hidden_size": 32, "layer": "BertLayer", "layers": 2}],
    "base_model_name_or_path": "",
    "beta": None,
    "bottleneck_dim": 8,
    "cached_layers": 0,
    "coupling": "meft1",
    "drift_tolerance": 0.01,
    "feedforward_module": None,
    "fraction_bits": 16,
    "frozen_layers": 0,
    "fused_loss": True,
    "gamma": None,
    "granularity": "layer",
    "inference_mode": True,
    "lam": None,
    "modules_to_save": ["classifier", "score"],
    "output": None,
    "peft_type": "MEFT",
    "peft_version": "0.21.2",
    "revision": None,
    "sign": "fixed",
    "stacks": None,
    "target_modules": None,
    "task_type": "SEQ_CLS",
    "tile_size": "auto",
}


@pytest.mark.parametrize(
    ("coupling", "meant"),
    [
        ("meft1", {"lam": 0.1, "beta": 1.0, "gamma": None, "output": "mean"}),
        ("momentum", {"lam": None, "beta": None, "gamma": 0.25, "output": "newest"}),
        ("adapter", {"lam": None, "beta": None, "gamma": None, "output": None}),
    ],
)
def test_a_folder_of_the_first_version(coupling: str, meant: dict[str, Any], tmp_path: Path) -> None:
    base = models.build("bert", layers=2)
    get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling=coupling)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    new = json.loads(path.read_text()).keys() - _SAVED.keys()
    assert new == {
        "compensated",
        "kernels",
        "residues",
        *(name for name in options_of(CONFIG) if name.startswith("adapter_")),
    }
    path.write_text(json.dumps({**_SAVED, "coupling": coupling}))
    config = PeftModel.from_pretrained(models.build("bert", layers=2), tmp_path).peft_config["default"]
    assert {name: getattr(config, name) for name in meant} == meant


def test_a_configuration_that_serves_again() -> None:
    """What one coupling decided does not bind another; what the user decided does."""
    config = meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1", output="newest")
    for _ in range(2):
        get_peft_model(models.build("bert"), config)
        assert (config.lam, config.beta, config.gamma) == (0.1, 1.0, None)
    config.coupling = "momentum"
    get_peft_model(models.build("bert"), config)
    assert (config.lam, config.beta, config.gamma, config.output) == (None, None, 1 / 32, "newest")
    config.gamma, config.coupling = 0.5, "meft2"
    with pytest.raises(ConfigError, match=r"gamma=0\.5 was given, but coupling='meft2' has no gamma"):
        get_peft_model(models.build("bert"), config)


def test_a_configuration_as_before() -> None:
    config = meft.MeftConfig("SEQ_CLS", coupling="meft2", output=["sum", 0.5], stacks=("a",))
    assert (config.task_type, config.output, config.stacks) == ("SEQ_CLS", ("sum", 0.5), ["a"])
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.plan() == config.plan()
    assert json.loads(json.dumps(config.to_dict()))["output"] == ["sum", 0.5]
    names = list(inspect.signature(meft.MeftConfig).parameters)
    assert names[names.index("coupling") :][:4] == ["coupling", "bottleneck_dim", "lam", "beta"]
