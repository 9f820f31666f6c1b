"""Requests: one for each image, with its prompt, negative prompt and seed."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.model_files import ROOT

from ldm.common.errors import UserError
from ldm.inference.requests import RANDOM_SEED_LIMIT, SEED_LIMIT, GenerationRequest, requests_for, seeds_for


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_requests_are_ordered_by_prompt_and_then_by_seed() -> None:
    expected = [GenerationRequest("a", 3), GenerationRequest("a", 4),
                GenerationRequest("b", 3), GenerationRequest("b", 4)]
    assert requests_for(["a", "b"], [3, 4]) == requests_for(["a", "b"], range(3, 5)) == expected
    assert [request.negative_prompt for request in expected] == [""] * 4


def test_each_prompt_may_have_its_own_seeds() -> None:
    requests = requests_for(["a", "b"], [[1, 2], [7]])
    assert requests == [GenerationRequest("a", 1), GenerationRequest("a", 2), GenerationRequest("b", 7)]


def test_no_prompts_or_no_seeds_give_no_requests() -> None:
    assert requests_for([], [1]) == requests_for(["a"], []) == []


@pytest.mark.parametrize(("negative_prompts", "expected"), [
    ("", ["", ""]), ((), ["", ""]), ("x", ["x", "x"]), (["x"], ["x", "x"]), (["x", "y"], ["x", "y"])])
def test_negative_prompts_are_one_for_all_or_one_for_each(
    negative_prompts: str | list[str], expected: list[str]
) -> None:
    requests = requests_for(["a", "b"], [1], negative_prompts)
    assert [request.negative_prompt for request in requests] == expected


@pytest.mark.parametrize("negative_prompts", [["x", "y", "z"], ["x", "y"]])
def test_a_wrong_number_of_negative_prompts_is_an_error(negative_prompts: list[str]) -> None:
    prompts = ["a", "b"] if len(negative_prompts) == 3 else ["a"]
    message = f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one"
    with pytest.raises(UserError, match=message):
        requests_for(prompts, [1], negative_prompts)


def test_seeds_count_up_and_are_the_same_for_every_prompt() -> None:
    assert seeds_for(2, 3, seed=5) == [[5, 6, 7], [5, 6, 7]]
    assert seeds_for(1, 1, seed=0) == [[0]]


def test_without_a_seed_a_random_one_is_chosen() -> None:
    (first, second), other = seeds_for(1, 2)[0], seeds_for(1, 1)[0][0]
    assert second == first + 1 and 0 <= first < RANDOM_SEED_LIMIT
    assert first != other  # equal in one of four billion runs
    state = torch.get_rng_state()
    seeds_for(1, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_generator_gives_every_image_another_seed() -> None:
    seeds = seeds_for(2, 2, generator=generator(1))
    assert len({seed for of_prompt in seeds for seed in of_prompt}) == 4
    assert seeds == seeds_for(2, 2, generator=generator(1)) != seeds_for(2, 2, generator=generator(2))


def test_each_image_may_have_its_own_generator() -> None:
    (first,), (second,) = seeds_for(2, 1, generator=[generator(1), generator(2)])
    assert [first] == seeds_for(1, 1, generator=generator(1))[0]
    assert [second] == seeds_for(1, 1, generator=generator(2))[0]


def test_a_used_generator_gives_other_seeds() -> None:
    source = generator(1)
    assert seeds_for(1, 1, generator=source) != seeds_for(1, 1, generator=source)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_images": 0}, "num_images 0 must be 1 or more"),
    ({"num_images": 1, "seed": 1, "generator": generator(1)}, "seed and generator both say where noise comes from"),
    ({"num_images": 2, "generator": [generator(1)]}, "1 generators for 4 images; give one, or one for each image"),
    ({"num_images": 1, "seed": -1}, "seed -1 must be 0 or more and less than"),
    ({"num_images": 1, "seed": SEED_LIMIT}, f"seed {SEED_LIMIT} must be 0 or more and less than")])
def test_invalid_seeds_are_errors_of_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        seeds_for(2, **arguments)
    assert "\n" not in str(error.value)


def test_the_largest_seed_is_usable() -> None:
    ((seed,),) = seeds_for(1, 1, seed=SEED_LIMIT - 1)
    torch.Generator().manual_seed(seed)


def test_importing_requests_and_settings_needs_no_torch() -> None:
    code = "import sys, ldm.inference.requests, ldm.inference.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
