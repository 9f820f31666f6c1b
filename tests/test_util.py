from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.common.errors import UserError
from ldm.common.instantiate import is_own
from ldm.data.folder import ImageFolder
from ldm.util import (
    check_param_names,
    count_params,
    default,
    exists,
    get_obj_from_str,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
    mean_flat,
    parallel_data_prefetch,
    pick_device,
    to_device,
    user_error_for,
)


def own(target: Any) -> Any:
    """Decorate a class or function of this file, so that it passes for one of the project's own."""
    target.__module__ = "ldm.made_up"
    return target


@own
class Base:
    def __init__(self, size: int, colour: Any = "red", *, depth: int = 1) -> None:
        self.given = {"size": size, "colour": colour, "depth": depth}


@own
class PassingOn(Base):
    def __init__(self, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given["extra"] = extra


@own
class Inheriting(PassingOn):
    """Inherits its constructor."""


@own
class WithoutKwargs(PassingOn):
    def __init__(self, only: int = 0) -> None:
        super().__init__(size=only)


@own
class Module(nn.Module):
    def __init__(self, width: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@own
def double(value: int, **ignored: Any) -> int:
    return 2 * value


halve = functools.partial(lambda value, by: value / by, by=2)


def built(name: str, **params: Any) -> Any:
    return instantiate_from_config({"target": f"test_util.{name}", "params": params})


def test_params_go_through_every_constructor_that_passes_them_on() -> None:
    expected = {"size": 3, "colour": "red", "depth": 2, "extra": 7}
    for name in ("PassingOn", "Inheriting"):
        assert built(name, size=3, depth=2, extra=7).given == expected


@own
class Renamed(PassingOn):
    renamed_params: ClassVar[dict[str, str]] = {"colour": "color"}

    def __init__(self, color: str = "red", **kwargs: Any) -> None:
        super().__init__(colour=color, **kwargs)


@own
class RenamedAgain(Renamed):
    renamed_params: ClassVar[dict[str, str]] = {"surplus": "extra"}


@pytest.mark.parametrize("params", [{"colour": "blue", "surplus": 2}, {"color": "blue", "extra": 2}])
def test_old_names_of_params_still_load(params: dict[str, Any]) -> None:
    built_object = built("RenamedAgain", size=1, **params)
    assert built_object.given == {"size": 1, "colour": "blue", "depth": 1, "extra": 2}


def test_a_param_given_under_both_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"test_util.Renamed: colour is the old name of color; give color alone"):
        built("Renamed", size=1, colour="red", color="blue")


@pytest.mark.parametrize(
    ("name", "params", "named", "known"),
    [
        ("Base", {"size": 1, "sise": 2, "color": 3}, "color, sise", "colour, depth, size"),
        ("PassingOn", {"size": 1, "dept": 2}, "dept", "colour, depth, extra, size"),
        ("Inheriting", {"size": 1, "dept": 2}, "dept", "colour, depth, extra, size"),
        ("WithoutKwargs", {"size": 1}, "size", "only"),
        ("Module", {"width": 1, "with": 2}, "with", "width"),
        ("double", {"value": 1, "valeu": 2}, "valeu", "value"),
        ("Base", {"size": 1, "self": 2}, "self", "colour, depth, size"),
        ("Base", {"size": 1, 5: 2}, "5", "colour, depth, size"),
    ],
)
def test_unknown_params_are_refused_by_name(name: str, params: dict[Any, Any], named: str, known: str) -> None:
    with pytest.raises(UserError) as refused:
        instantiate_from_config({"target": f"test_util.{name}", "params": params})
    refusal, _, question = str(refused.value).partition("; do you mean ")
    assert refusal == f"test_util.{name} does not know {named}; it knows {known}"
    assert not question or set(question.rstrip("?").split(" and ")) <= set(known.split(", "))


def test_unknown_params_of_library_classes() -> None:
    check_param_names("a linear layer", nn.Linear, {"in_features": 1, "bias": False, "device": "cpu"})
    with pytest.raises(UserError, match="a linear layer does not know in_feature;"):
        check_param_names("a linear layer", nn.Linear, {"in_feature": 1})


def test_functions_and_other_callables() -> None:
    assert built("double", value=4) == 8
    assert built("halve", value=4) == 2
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert instantiate_from_config({"target": "builtins.dict", "params": {}}) == {}


def test_missing_params_are_named() -> None:
    with pytest.raises(UserError, match=r"test_util.Base needs size"):
        built("Base", colour="blue")


def test_extra_overrides_params() -> None:
    config = {"target": "test_util.Base", "params": {"size": 1, "depth": 2}}
    assert instantiate_from_config(config, size=5).given == {"size": 5, "colour": "red", "depth": 2}
    assert instantiate_from_config({"target": "test_util.Base"}, size=5).given["size"] == 5


def test_omegaconf_is_resolved_to_plain_values() -> None:
    config = OmegaConf.create(
        {"width": 4, "part": {"target": "test_util.Base", "params": {"size": "${width}", "colour": {"list": [1, 2]}}}}
    )
    given = instantiate_from_config(config.part).given
    assert given["size"] == 4 and type(given["colour"]) is dict and type(given["colour"]["list"]) is list


def test_dangling_omegaconf_references() -> None:
    config = OmegaConf.create({"target": "test_util.Base", "params": {"size": "${width}"}})
    with pytest.raises(UserError, match=r"test_util.Base.*width"):
        instantiate_from_config(config)


@pytest.mark.parametrize("word", ["__is_first_stage__", "__is_unconditional__"])
def test_strings_that_mean_no_module(word: str) -> None:
    assert instantiate_from_config(word) is None


@pytest.mark.parametrize("config", [{}, {"params": {}}, "target", None, [1], 3])
def test_sections_without_a_target(config: Any) -> None:
    with pytest.raises(UserError, match="^config section without a `target`"):
        instantiate_from_config(config)
    with pytest.raises(KeyError):
        instantiate_from_config(config)


def test_other_keys_of_a_section_are_left_to_the_caller() -> None:
    config = {"base_learning_rate": 1e-6, "target": "test_util.double", "params": {"value": 2}, "comment": "mine"}
    assert instantiate_from_config(config) == instantiate_from_config(OmegaConf.create(config)) == 4


@pytest.mark.parametrize("key", ["param", "parms", "prams", "Params", "targets"])
def test_misspelt_sections_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"test_util.halve: unknown key {key}; did you mean (params|target)"):
        instantiate_from_config({"target": "test_util.halve", key: {"value": 1}})


class Foreign:
    """A class as users write it."""

    def __init__(self, size: int = 1, **kwargs: Any) -> None:
        if size == -1:
            raise ValueError("a size below zero")
        self.given = {"size": size, **kwargs}


@own
class Around:
    def __init__(self, part: dict[str, Any]) -> None:
        self.part = instantiate_from_config(part)


def test_users_classes_take_any_params() -> None:
    assert built("Foreign", size="large", target=3).given == {"size": "large", "target": 3}
    with pytest.raises(TypeError, match="sise"):
        built("halve", value=1, sise=3)


def test_users_classes_get_omegaconf_values() -> None:
    config = OmegaConf.create({"width": 4, "part": {"target": "test_util.Foreign", "params": {
        "size": "${width}", "inner": {"sizes": [1]}}}})
    given = instantiate_from_config(config.part, extra=5).given
    assert given["size"] == 4 and given["inner"].sizes[0] == 1 and given["extra"] == 5


def test_exceptions_of_users_classes_pass() -> None:
    for name, params in (("Foreign", {"size": -1}),
                         ("Around", {"part": {"target": "test_util.Foreign", "params": {"size": -1}}})):
        with pytest.raises(ValueError, match="^a size below zero$") as passed:
            built(name, **params)
        assert not isinstance(passed.value, UserError)


@pytest.mark.parametrize(("module", "file", "own_module"), [
    ("ldm.data.folder", "ldm/data/folder.py", True), ("scripts.made_up", "scripts/made_up.py", True),
    ("scripts.made_up", "/home/user/scripts/made_up.py", False), ("evaluation.made_up", None, False),
    ("cldm.cldm", "cldm/cldm.py", False)])
def test_which_classes_are_own(module: str, file: str | None, own_module: bool,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__file__=file and str(root / file)))
    assert is_own(type("Made", (), {"__module__": module})) is own_module




@pytest.mark.parametrize("params", [[1, 2], "size=3", OmegaConf.create([1])])
def test_params_must_be_a_mapping(params: Any) -> None:
    with pytest.raises(UserError, match=r"test_util.Base"):
        instantiate_from_config({"target": "test_util.Base", "params": params})


@pytest.mark.parametrize(
    "target", ["no.such.module.Thing", "torch.nn.NoSuchLayer", "nodots", "", ".nn.Linear", "torch..nn.Linear", None, 5]
)
def test_targets_that_cannot_be_imported(target: Any) -> None:
    with pytest.raises(UserError, match="cannot be imported") as refused:
        get_obj_from_str(target)
    assert "\n" not in str(refused.value)


def test_targets_are_imported() -> None:
    assert get_obj_from_str("torch.nn.Linear") is nn.Linear
    assert get_obj_from_str("ldm.data.folder.PictureFolder") is ImageFolder


@pytest.mark.parametrize(("target", "error"), [
    ("no.such.module.Thing", ModuleNotFoundError), ("no.such.module.Thing", ImportError),
    ("torch.nn.NoSuchLayer", AttributeError), ("nodots", ValueError)])
def test_failing_imports_are_pythons_errors_too(target: str, error: type[Exception]) -> None:
    """Users' scripts catch them as such."""
    with pytest.raises(error):
        get_obj_from_str(target)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A function that writes a module of a user, found before any other. It is forgotten afterwards."""
    names = []

    def write(name: str, code: str) -> Path:
        names.append(name)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        return path

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_modules_can_be_imported_again(user_module: Callable[[str, str], Path]) -> None:
    path = user_module("changing", "value = 1")
    assert get_obj_from_str("changing.value") == 1
    path.write_text("value = 23")
    assert get_obj_from_str("changing.value") == 1 and get_obj_from_str("changing.value", reload=True) == 23


def test_errors_in_a_users_module_pass(user_module: Callable[[str, str], Path]) -> None:
    user_module("broken", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        get_obj_from_str("broken.Thing")


def test_the_users_own_main_comes_first(user_module: Callable[[str, str], Path]) -> None:
    user_module("main", "ImageLogger = 'of the user'")
    assert get_obj_from_str("main.ImageLogger") == "of the user"
    assert get_obj_from_str("main.SetupCallback").__module__ == "ldm.training.callbacks"


def test_the_running_main_comes_before_others(user_module: Callable[[str, str], Path],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = user_module("main", "ImageLogger = 'of another main.py'")
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(ImageLogger="running", __file__=str(path)))
    assert get_obj_from_str("main.ImageLogger") == "running"


def test_default() -> None:
    assert default(None, 3) == 3 and default(0, 3) == 0
    assert default(None, lambda: 3) == 3 and default(0, lambda: 3) == 0
    assert default(None, dict) is dict, "only functions are called"
    assert exists(0) and not exists(None)


@pytest.mark.parametrize(("shape", "image", "feature_map"), [
    ((2, 3, 4, 4), True, False), ((2, 1, 4, 4), True, False), ((2, 4, 4, 4), False, True),
    ((2, 2, 4, 4), False, False), ((3, 4, 4), False, False)])
def test_images_and_feature_maps(shape: tuple[int, ...], image: bool, feature_map: bool) -> None:
    x = torch.zeros(shape)
    assert isimage(x) is image and ismap(x) is feature_map
    assert not isimage(["text"]) and not ismap(None)


def test_mean_over_all_but_the_batch() -> None:
    assert torch.equal(mean_flat(torch.arange(12.0).view(2, 2, 3)), torch.tensor([2.5, 8.5]))


def test_texts_are_drawn_as_images() -> None:
    images = log_txt_as_img((128, 64), ["", "a", "a" * 20, "a" * 21], size=10)
    assert images.shape == (4, 3, 64, 128) and images.dtype == torch.float64
    assert (images[0] == 1).all() and images.min() >= -1 and images[1].min() < 0
    dark_rows = (images < 0).any(dim=3).any(dim=1).sum(1)
    assert 0 < dark_rows[2] < dark_rows[3], "20 characters fit a line of 128 pixels, 21 do not"


def double_all(part: Any, worker_id: int = 0) -> Any:
    return [2 * item + worker_id for item in part]


@pytest.mark.parametrize("processes", [False, True])
def test_data_are_processed_in_parallel(processes: bool) -> None:
    def run(data: Any, **options: Any) -> Any:
        return parallel_data_prefetch(double_all, data, n_proc=3, cpu_intensive=processes, **options)

    array = run(range(7))
    assert isinstance(array, np.ndarray) and array.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert run({"a": 1, "b": 2}, target_data_type="list") == [2, 4]
    assert run(range(7), target_data_type="dict") == [[0, 2, 4], [6, 8, 10], [12]]
    assert run(range(7), target_data_type="list", use_worker_id=True) == [0, 2, 4, 7, 9, 11, 14]


def test_data_that_cannot_be_processed_in_parallel() -> None:
    with pytest.raises(ValueError, match="array"):
        parallel_data_prefetch(double_all, np.zeros(3), 2, target_data_type="list")
    with pytest.raises(TypeError, match="int"):
        parallel_data_prefetch(double_all, 3, 2)
    with pytest.raises(RuntimeError, match="worker 0 failed: TypeError"):
        parallel_data_prefetch(double_all, [None], 1, target_data_type="list", cpu_intensive=False)


def test_counting_parameters(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert (count_params(layer), count_params(layer, trainable_only=True)) == (8, 6) and not caplog.text
    with caplog.at_level("INFO"):
        assert count_params(layer, verbose=True) == 8
    assert "Linear has 0.00 M params." in caplog.text


@pytest.mark.parametrize("name", ["gpu", "tpu", "meta", "cuda:99", "xla", "vulkan", "cpu:x", ""])
def test_missing_devices_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="--device"):
        pick_device(name)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_picked(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(*size))
    assert pick_device() == torch.device(expected)


def test_a_named_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")


class RecordingTensor:
    """Stands in for a tensor of `nbytes` bytes, and records how it is copied."""

    def __init__(self, nbytes: int, device: str = "cpu") -> None:
        self.nbytes, self.device, self.pinned = nbytes, torch.device(device), False

    def pin_memory(self) -> RecordingTensor:
        self.pinned = True
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> tuple[str, bool, bool]:
        return device.type, non_blocking, self.pinned


@pytest.mark.parametrize(("nbytes", "source", "target", "waits", "pinned"), [
    (100, "cpu", "cuda", False, False), (2**20, "cpu", "cuda", False, True), (2**20, "cpu", "mps", True, False),
    (2**20, "cpu", "cpu", True, False), (2**20, "cuda", "cpu", True, False)])
def test_which_copies_wait(nbytes: int, source: str, target: str, waits: bool, pinned: bool) -> None:
    """Copies to the CPU wait, since they might be read too early."""
    assert to_device(RecordingTensor(nbytes, source), torch.device(target)) == (target, not waits, pinned)


def test_copies_equal_the_original() -> None:
    x = torch.randn(3, 2)
    assert torch.equal(to_device(x, torch.device("cpu")), x)


def run_as(module: str, code: str) -> None:
    """Run code as if a module of that name contained it."""
    namespace = {"__name__": module, "torch": torch}
    exec(f"def function():\n    {code}", namespace)
    namespace["function"]()


OWN_BUGS = ["{}['missing']", "1 + 'a'", "[][0]", "int('x')", "1 / 0", "raise ValueError('not ours to raise')",
            "assert False", "raise NotImplementedError"]


@pytest.mark.parametrize("code", OWN_BUGS)
@pytest.mark.parametrize("module", ["ldm.models.made_up", "evaluation.made_up", "scripts.made_up"])
def test_own_bugs_are_not_blamed_on_the_user(module: str, code: str) -> None:
    with pytest.raises(Exception) as bug, user_error_for("x cannot be built"):
        run_as(module, code)
    assert not isinstance(bug.value, UserError)


@pytest.mark.parametrize("code", OWN_BUGS)
def test_errors_of_libraries_name_the_users_value(code: str) -> None:
    with pytest.raises(UserError, match=r"^x cannot be built \("), user_error_for("x cannot be built"):
        run_as("some_library.module", code)


def test_errors_of_torch_operators_in_own_code_name_the_users_value() -> None:
    """torch's operators leave no frame in a traceback."""
    with pytest.raises(UserError, match="RuntimeError"), user_error_for("x cannot be built"):
        run_as("ldm.models.made_up", "torch.ones(2) + torch.ones(3)")


def test_errors_of_a_function_called_with_the_users_values_name_them() -> None:
    with pytest.raises(UserError, match="ValueError"), user_error_for("x cannot be built"):
        int("no number")


def test_a_bug_in_a_constructor_passes_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing mistake in one of the project's own constructors is not the user's."""
    namespace: dict[str, Any] = {"__name__": "ldm.modules.made_up"}
    exec("class Buggy:\n    def __init__(self, size=1):\n        self.sizes = {}['size']", namespace)
    monkeypatch.setattr("ldm.common.instantiate.get_obj_from_str", lambda path: namespace["Buggy"])
    with pytest.raises(KeyError, match="size"):
        instantiate_from_config({"target": "ldm.modules.made_up.Buggy", "params": {"size": 3}})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: assert")])
def test_errors_of_the_device_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, user_error_for("x cannot be built"):
        raise error
    assert passed.value is error


@pytest.mark.parametrize(("given", "end"), [
    ({"max_step": 1}, "it knows data_root, max_steps; do you mean max_steps?"),
    ({"data_rot": 1, "max_step": 2}, "; do you mean data_root and max_steps?"), ({"zzz": 1}, "data_root, max_steps")])
def test_a_misspelt_param_names_the_one_that_is_meant(given: dict[str, int], end: str) -> None:
    def build(max_steps: int, data_root: int) -> None:
        pass

    with pytest.raises(UserError) as error:
        check_param_names("config", build, given)
    assert str(error.value).endswith(end)
