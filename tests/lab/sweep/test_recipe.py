from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from meft.errors import ConfigError
from meft_lab.cli.sweep import typed_values
from meft_lab.sweep import builtin_recipes, load_recipe
from meft_lab.sweep.recipe import Recipe

RECIPE: dict[str, Any] = {
    "description": "For tests.",
    "arguments": {"model_name_or_path": "somewhere", "num_train_epochs": 1},
    "grid": {"task": ["rte", "mrpc"], "method": ["full", "lora"]},
    "special": [
        {"when": {"task": "mrpc"}, "arguments": {"num_train_epochs": 2, "max_seq_length": 8}},
        {"when": {"task": "mrpc", "method": "full"}, "arguments": {"max_seq_length": None}},
    ],
    "choose": {"among": {"learning_rate": ["1e-3", "1e-2"]}, "per": ["method"], "on": {"task": ["rte"]}},
    "seeds": [3, 4],
}


def load(folder: Path, typed: str = "", **changes: Any) -> Recipe:
    path = folder / "recipe.yaml"
    content = {name: value for name, value in (RECIPE | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(str(path), typed_values(typed.split()))


def test_the_grid_and_what_is_special(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.name == "recipe" and recipe.seeds == (3, 4)
    assert recipe.points() == [
        {"task": "rte", "method": "full"},
        {"task": "rte", "method": "lora"},
        {"task": "mrpc", "method": "full"},
        {"task": "mrpc", "method": "lora"},
    ]
    rte, _, full, lora = map(recipe.arguments_of, recipe.points())
    assert rte == {"model_name_or_path": "somewhere", "num_train_epochs": 1, "task": "rte", "method": "full"}
    assert lora == rte | {"task": "mrpc", "method": "lora", "num_train_epochs": 2, "max_seq_length": 8}
    assert full == rte | {"task": "mrpc", "num_train_epochs": 2}
    assert recipe.rows == ("method",) and recipe.columns == ("task",)


def test_what_is_typed_narrows_an_axis_or_wins_over_every_argument(tmp_path: Path) -> None:
    recipe = load(tmp_path, "--method lora --num_train_epochs=7 --seeds 5,6 7 --learning_rate 1e-2 --bf16")
    assert recipe.grid == {"task": ("rte", "mrpc"), "method": ("lora",)}
    assert recipe.seeds == (5, 6, 7)
    assert recipe.choice is not None and recipe.choice.candidates(recipe.points()[0]) == [{"learning_rate": "1e-2"}]
    assert [recipe.arguments_of(point)["num_train_epochs"] for point in recipe.points()] == ["7", "7"]
    assert recipe.arguments_of(recipe.points()[0])["bf16"] == "true"


def test_narrowed_past_what_a_choice_looks_at_it_looks_at_what_there_is(tmp_path: Path) -> None:
    recipe = load(tmp_path, "--task mrpc")
    assert recipe.choice is not None
    assert all(recipe.choice.looks_at(point) for point in recipe.points())


def test_one_choice_for_each_point_unless_it_says_otherwise(tmp_path: Path) -> None:
    recipe = load(tmp_path, choose={"among": {"learning_rate": [1, 2], "weight_decay": [0, 1]}})
    assert recipe.choice is not None
    assert recipe.choice.per == ("task", "method") and len(recipe.choice.candidates(recipe.points()[0])) == 4


def test_a_choice_may_be_narrowed_for_some_of_the_points(tmp_path: Path) -> None:
    narrow = [{"when": {"task": "rte"}, "among": {"rate": [1]}}]
    choose = {"among": {"rate": [1, 2], "size": [3, 4]}, "narrow": narrow}
    recipe = load(tmp_path, choose=choose)
    assert recipe.choice is not None
    counts = {point["task"]: len(recipe.choice.candidates(point)) for point in recipe.points()}
    assert counts == {"rte": 2, "mrpc": 4}
    # What is typed means what it says.
    typed = load(tmp_path, "--rate 2", choose=choose)
    assert typed.choice is not None
    assert {point["rate"] for grid in typed.points() for point in typed.choice.candidates(grid)} == {"2"}


def test_the_values_of_an_axis_may_be_names_of_several_arguments(tmp_path: Path) -> None:
    ways = {"near": {"method": "meft1", "lam": 0.01, "num_train_epochs": 5}, "lora": {"method": "lora"}}
    recipe = load(tmp_path, grid=recipe_grid(ways), special=None, choose=None)
    near, lora = map(recipe.arguments_of, recipe.points())
    assert recipe.row_names() == ["near", "lora"]
    expected = {"model_name_or_path": "somewhere", "task": "rte", "method": "meft1", "lam": 0.01}
    assert near == expected | {"num_train_epochs": 5}
    assert lora["method"] == "lora" and lora["num_train_epochs"] == 1 and "way" not in lora
    narrowed = load(tmp_path, "--way lora --num_train_epochs 2", grid=recipe_grid(ways), special=None, choose=None)
    assert [narrowed.arguments_of(point)["num_train_epochs"] for point in narrowed.points()] == ["2"]
    assert narrowed.row_names() == ["lora"]


def recipe_grid(ways: dict[str, Any]) -> dict[str, Any]:
    return {"task": ["rte"], "way": ways}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grit": {}}, r"unknown key 'grit'; the keys are .* Did you mean 'grid'"),
        ({"grid": {"task": []}}, r"task in grid .* is \[\]; it must be a list of different values"),
        ({"grid": {"task": ["rte", "rte"]}}, "list of different values"),
        ({"grid": {"seed": [1]}, "special": None, "choose": None}, "seed is in grid .* Give --seeds"),
        ({"grid": 5}, "grid of .* is 5; it must be lines such as"),
        ({"arguments": {"output_dir": "x"}}, "output_dir is in arguments .* the sweep sets it itself"),
        ({"special": {"when": {}}}, "special of .* must be a list of entries"),
        ({"special": [{"if": {}}]}, "an entry of special in .* has the unknown key 'if'"),
        ({"special": [{"when": {"model": "x"}}]}, "when names 'model' .* no axis; the axes are task, method, learning"),
        ({"special": [{"when": {"task": "rt"}}]}, "when says task: rt .* the values there are rte, mrpc"),
        ({"special": [{"when": {}, "arguments": {"method": "lora"}}]}, "method is an axis .* one of the two"),
        ({"choose": {"among": {}}}, "nothing to choose among"),
        ({"choose": {"among": {"task": ["x"]}}}, "task is in grid and in choose"),
        ({"choose": {"among": {"a": [1]}, "per": ["model"]}}, "choose names 'model'"),
        ({"choose": {"among": {"a": [1]}, "on": {"task": ["x"]}}}, "on says task: x"),
        ({"choose": {"among": {"a": [1]}, "on": {"task": ["rte"]}}}, "chooses for every one of them"),
        ({"grid": {"way": {"a": 5}}, "special": None, "choose": None}, "a of way of .* is 5; it must be lines such as"),
        (
            {"grid": {"task": ["x"], "way": {"a": {"task": "y"}}}, "special": None, "choose": None},
            "task is an axis .* a;",
        ),
        (
            {"choose": {"among": {"a": [1]}, "narrow": [{"when": {"model": "x"}}]}},
            "narrow names 'model' .* task, method",
        ),
        ({"choose": {"among": {"a": [1]}, "narrow": [{"among": {"a": [2]}}]}}, "narrow says a: 2 .* it must be 1"),
        ({"seeds": []}, "seeds of .* must be a list of different whole numbers"),
        ({"seeds": ["one"]}, "seeds of .* must be a list of different whole numbers"),
        ({"seeds": [-1]}, "whole numbers from 0 on"),
        ({"keep_models": "maybe"}, "keep_models of .* must be true or false"),
        ({"references": ["meft1"]}, "references of .* names 'meft1', which is no row; the rows are full, lora"),
        ({"table": {"rows": ["method"]}}, None),
        ({"table": {"rows": ["task"], "columns": ["task"]}}, "together they must be the axes of grid, each once"),
    ],
)
def test_bad_recipes(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    if message is None:
        assert load(tmp_path, **changes).columns == ("task",)
        return
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("rte", "'rte' stands after the recipe without a name"),
        ("--task rte --task mrpc", "--task stands twice"),
        ("--seed 1", "--seed cannot be typed beside a recipe: .* Give --seeds"),
        ("--task=,", "--task stands without a value"),
    ],
)
def test_bad_words(typed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, typed)


def test_an_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor the name of a recipe; those are .*glue-roberta"):
        load_recipe(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_run_of_the_recipes_that_come_with_meft_has_valid_arguments(name: str, tmp_path: Path) -> None:
    from meft_lab.sweep import Sweep

    typed = {"use_cpu": ["true"], "seeds": ["0"], "model_name_or_path": ["some-model"]}
    sweep = Sweep(load_recipe(name, typed), tmp_path)
    assert sweep.planned() >= len(sweep.recipe.points())
