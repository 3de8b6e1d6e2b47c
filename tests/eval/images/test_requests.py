"""Lists of prompts: fixed, complete, each image with a seed of its own."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest

from eval import EvalError
from eval.images import requests as requests_module


def test_the_demo_list_has_every_class_once_under_its_own_seed():
    from tofu_sd.demo.scene_classes import CLASSES

    requests = requests_module.load_requests("demo", first_seed=100)
    assert sorted(r.prompt for r in requests) == sorted(kind.prompt for kind in CLASSES)
    assert all(r.seed == 100 + int(r.id) and r.prompt == CLASSES[int(r.id)].prompt for r in requests)


def test_each_embedded_model_has_its_own_prompts_by_default():
    assert [requests_module.default_prompts(name) for name in ("demo", "demo-textures", "mine")] == [
        "demo", "textures", "demo",
    ]  # fmt: skip
    from tofu_sd.demo.texture_classes import CLASSES

    assert {r.prompt for r in requests_module.load_requests("textures")} == {kind.prompt for kind in CLASSES}


def test_the_first_demo_prompts_are_a_mixture():
    """--limit 12 should show more than one corner of the model."""
    from tofu_sd.demo.scene_classes import CLASSES

    first = [CLASSES[int(r.id)] for r in requests_module.load_requests("demo")[:12]]
    assert {kind.shape for kind in first} == {kind.shape for kind in CLASSES}
    assert {kind.material for kind in first} == {kind.material for kind in CLASSES}
    assert {kind.setting for kind in first} == {kind.setting for kind in CLASSES}


def test_imagenet_has_two_images_of_each_class_with_unique_seeds():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision, which lists the class names, is not installed")
    requests = requests_module.load_requests("imagenet1k", first_seed=5)  # the hash of the names is checked on the way
    assert len(requests) == 2000
    assert requests[3] == requests_module.Request("0001_1", "A high-quality photograph of a goldfish", 8)
    assert len({r.seed for r in requests}) == 2000
    assert len({r.id for r in requests}) == 2000


def test_imagenet_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvalError, match="pip install torchvision"):
        requests_module.load_requests("imagenet1k")


def test_changed_imagenet_names_are_refused(monkeypatch, tmp_path):
    """Other names under the same list name would not be the same measurement."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "_meta.py").write_text('_IMAGENET_CATEGORIES = ["tench", "cat"]\n')
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EvalError, match=requests_module.IMAGENET_HASH):
        requests_module.load_requests("imagenet1k")


def test_text_file_has_a_prompt_on_each_line(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("a fox\n\n  ein Käfer \n", encoding="utf-8")
    assert requests_module.load_requests(str(file), 7) == [
        requests_module.Request("0000", "a fox", 7),
        requests_module.Request("0001", "ein Käfer", 8),
    ]


def test_a_jsonl_file_may_give_ids_and_seeds(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a fox"}\n{"prompt": "a bee", "id": "bee", "seed": 3}\n')
    assert requests_module.load_requests(str(file), 7) == [
        requests_module.Request("0000", "a fox", 7),
        requests_module.Request("bee", "a bee", 3),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["", "no json"], "own.jsonl, line 2: not JSON"),
        ([{"text": "a fox"}], "'prompt'"),
        ([{"prompt": None}], "text as 'prompt'"),
        ([{"prompt": "a", "seed": 1.9}], r"the seed is 1\.9"),
        ([{"prompt": "a", "seed": None}], "the seed is None"),
        ([{"prompt": "a", "seed": 10**20}], r"from 0 to 2\*\*62"),
        ([{"prompt": "a", "sead": 1}], "'sead'"),
        ([{"prompt": "a", "id": "../b"}], r"'\.\./b' cannot name a file"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "two prompts have the id 'x'"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "X"}], "two prompts have the id 'X'"),  # on some disks
        ([], "empty"),
    ],
)
def test_invalid_prompt_file_is_refused_with_its_line(tmp_path, rows, said):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    with pytest.raises(EvalError, match=said):
        requests_module.load_requests(str(file))


@pytest.mark.parametrize("character", ["\\r", "\\u0000", "\\ud83d"])
def test_characters_that_csv_cannot_hold_are_refused_with_their_line(tmp_path, character):
    """A lone return splits a row of per_image.csv, half of a pair cannot be written: both came to light after the
    drawing."""
    (tmp_path / "own.jsonl").write_text(f'{{"prompt": "fine"}}\n{{"prompt": "a fox{character}jumps"}}\n')
    with pytest.raises(EvalError, match=r"own\.jsonl, line 2: the prompt holds '\\"):
        requests_module.load_requests(str(tmp_path / "own.jsonl"))
    (tmp_path / "own.jsonl").write_text('{"prompt": "a \\ud83d\\ude00 on\\ntwo lines"}\n')
    assert requests_module.load_requests(str(tmp_path / "own.jsonl"))[0].prompt == "a \U0001f600 on\ntwo lines"


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "own.txt").write_bytes("ein Käfer".encode("latin-1"))
    with pytest.raises(EvalError, match=r"own\.txt'.*not UTF-8"):
        requests_module.load_requests(str(tmp_path / "own.txt"))


def test_byte_order_mark_and_unicode_line_ends_are_ignored(tmp_path):
    (tmp_path / "own.txt").write_text("a fox\n", encoding="utf-8-sig")
    assert requests_module.load_requests(str(tmp_path / "own.txt"))[0].prompt == "a fox"
    (tmp_path / "own.jsonl").write_text('{"prompt": "a\u2028fox"}\n', encoding="utf-8")
    assert [r.prompt for r in requests_module.load_requests(str(tmp_path / "own.jsonl"))] == ["a\u2028fox"]


def test_unknown_list_suggests_the_nearest_name():
    with pytest.raises(EvalError, match=r"'imagenet'.*did you mean 'imagenet1k'.*known: demo"):
        requests_module.load_requests("imagenet")


def test_requests_hash_distinguishes_lists():
    assert requests_module.requests_hash(requests_module.load_requests("demo", 0)) != requests_module.requests_hash(
        requests_module.load_requests("demo", 1)
    )


def test_per_prompt_begins_with_one_image_of_each_prompt():
    one = requests_module.load_requests("demo", 7)
    three = requests_module.repeat(one, 3, len(one))
    assert three[: len(one)] == one == requests_module.repeat(one, 1, len(one))
    assert len({(r.id) for r in three}) == len({r.seed for r in three}) == 3 * len(one)
    assert [r.prompt for r in three[len(one) :]] == 2 * [r.prompt for r in one]
    few = requests_module.repeat(one[:4], 3, len(one))
    assert set(few) < set(three)  # a limited list draws images of the whole one


def test_per_prompt_needs_unique_ids():
    with pytest.raises(EvalError, match="two prompts have the id 'a_1'"):
        requests_module.repeat([requests_module.Request("a", "x", 0), requests_module.Request("a_1", "y", 1)], 2, 2)


def test_some_classes_of_a_list_keep_their_ids_and_seeds():
    """So that a part of a run is a part of its files, and can be generated first."""
    whole = [requests_module.Request(f"{i:04d}_{k}", f"a {i}", 2 * i + k) for i in range(12) for k in range(2)]
    chosen = requests_module.only(whole, "3, 0007_1,9-10")
    assert [r.id for r in chosen] == ["0003_0", "0003_1", "0007_1", "0009_0", "0009_1", "0010_0", "0010_1"]
    assert set(chosen) <= set(whole)
    named = [requests_module.Request("dog", "a dog", 0), requests_module.Request("7", "a cat", 1)]
    assert requests_module.only(named, "dog") == named[:1]
    assert requests_module.only(named, "7") == named[1:]


@pytest.mark.parametrize("asked", ["12", "9-12", "0003_2", "", "dog", "10-9-8", "9-3"])
def test_unknown_ids_are_refused(asked):
    whole = [requests_module.Request(f"{i:04d}_{k}", f"a {i}", 2 * i + k) for i in range(12) for k in range(2)]
    with pytest.raises(EvalError, match="ids go from 0000_0 to 0011_1"):
        requests_module.only(whole, f"1,{asked}")


def test_selected_requests_are_part_of_the_whole_list():
    """Ids, seeds and order of what is left do not depend on what is left out; a limit counts prompts, not images."""
    whole = [requests_module.Request(f"{i:04}", "a fox", 10 + i) for i in range(12)]
    assert requests_module.select(whole, 1, None, None) == whole
    assert requests_module.select(whole, 2, None, 3) == requests_module.repeat(whole[:3], 2, len(whole))
    assert requests_module.select(whole, 1, "4-9", 2) == whole[4:6]
    twice = requests_module.repeat(whole, 2, len(whole))
    assert requests_module.select(whole, 2, "0004_1,7", None) == [
        whole[7],
        twice[len(whole) + 4],
        twice[len(whole) + 7],
    ]
    assert requests_module.select(whole, 2, "0004_1,7", 1) == [twice[len(whole) + 4]]
