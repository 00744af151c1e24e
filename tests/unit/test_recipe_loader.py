"""The recipe loader: presets, files, overrides, and errors that a user can act on."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.recipe import Recipe, list_presets, load_recipe, preset_markdown, recipe_schema_markdown

STRATEGY = [f"A{i}{g}" for i in range(1, 5) for g in ("", "-G128", "-G16")] + [
    "B1",
    "B2",
    "B3",
    "C1",
    "C2",
    "start-h100",
    "start-portable",
]


def test_every_strategy_name_is_a_preset_with_a_description():
    presets = {name: (description, recipe) for name, description, recipe in list_presets()}
    assert set(presets) == set(STRATEGY)
    for name, (description, recipe) in presets.items():
        assert description and "\n" not in description
        assert recipe.indivisible == "smaller", name


@pytest.mark.parametrize(
    "name, method, group, keep",
    [
        ("A1", "nvfp4", 64, "nothing"),
        ("A3-G16", "nvfp4", 16, "blocks"),
        ("A4-G128", "nvfp4", 128, "projections"),
        ("B1", "gptq", 128, "nothing"),
        ("B2", "gptq", 128, "blocks"),
        ("B3", "gptq", 64, "nothing"),
        ("C1", "awq", 128, "nothing"),
        ("C2", "awq", 128, "blocks"),
        ("start-portable", "gptq", 128, "nothing"),
    ],
)
def test_presets_say_what_the_strategy_says(name, method, group, keep):
    recipe = load_recipe(name)
    assert (recipe.method, recipe.group_size, recipe.boundary.keep) == (method, group, keep)
    assert "lm_head" in recipe.ignore


def test_a2_says_that_it_equals_a1():
    assert "same bytes as A1" in load_recipe("A2").description
    assert load_recipe("a2") == load_recipe("A2")


def test_file_then_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: gptq\nboundary: {blocks: 2}\n")
    recipe = load_recipe(str(path), ["boundary.keep=blocks", "group_size=64", "ignore+=re:.*up_proj", "damp=0.1"])
    assert recipe.boundary.blocks == 2 and recipe.boundary.keep == "blocks"
    assert recipe.group_size == 64 and recipe.damp == 0.1
    assert recipe.ignore == ("lm_head", "re:.*up_proj")


def test_override_of_the_method_moves_what_follows_from_it():
    recipe = load_recipe("B3", ["method=awq"])
    assert (recipe.grid, recipe.format, recipe.scaling) == ("int4_asym", "awq", "awq")


def test_overrides_do_not_leak_into_the_preset():
    load_recipe("B1", ["ignore+=x", "boundary.keep=blocks"])
    assert load_recipe("B1").ignore == ("lm_head",)
    assert load_recipe("B1").boundary.keep == "nothing"


def test_list_values():
    assert load_recipe("B1", ["ignore=[]"]).ignore == ()
    assert load_recipe("B1", ["ignore=model.layers.0.mlp.down_proj"]).ignore == ("model.layers.0.mlp.down_proj",)


def test_an_empty_file_is_the_default_recipe(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_recipe(str(path)) == Recipe()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["grup_size=64"], ["unknown recipe key 'grup_size'", "did you mean 'group_size'?"]),
        (["boundary.kep=blocks"], ["'boundary.kep'", "did you mean 'keep'?"]),
        (["group_size=48"], ["group_size 48", "32, 64, 128"]),
        (["group_size=lots"], ["group_size", "integer", "'lots'"]),
        (["group_size"], ["key=value"]),
        (["group_size+=1"], ["+="]),
        (["method.name=x"], ["method is a value"]),
        (["ignore=[a"], ["not a YAML value"]),
        (["method=nvfp4", "format=gptq", "group_size=16"], ["format gptq cannot hold", "modelopt"]),
        (["boundary.blocks=-1"], ["boundary.blocks", "greater than or equal to 0"]),
    ],
)
def test_wrong_overrides_are_one_line(overrides, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("B1", overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("metod: gptq\n", ["'metod'", "did you mean 'method'?"]),
        ("boundary:\n  bloks: 1\n", ["'boundary.bloks'", "'blocks'"]),
        ("- gptq\n", ["mapping"]),
        ("method: [\n", ["not valid YAML", "line"]),
        ("boundary: 3\n", ["boundary"]),
        ("7: x\n", ["'7'"]),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value) and "bad.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_names():
    with pytest.raises(UsageError, match="did you mean 'start-portable'"):
        load_recipe("start-portabel")
    with pytest.raises(UsageError, match="does not exist"):
        load_recipe("nowhere/r.yaml")
    with pytest.raises(UsageError, match="use A1, A2"):
        load_recipe("zzzzzzzz")


def test_markdown_names_every_key_and_preset():
    table = recipe_schema_markdown()
    for key in ("method", "group_size", "boundary.keep", "calibration.max_tokens", "damp"):
        assert f"| `{key}` |" in table
    assert len({line.count(" | ") for line in table.splitlines()[2:]}) == 1
    presets = preset_markdown()
    assert all(f"`{name}`" in presets for name in STRATEGY)
