"""contents: tensors, containers and the user's objects that modules hold, found in one walk."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octav_fx.capture.contents import Contents
from octav_fx.capture.module_state import preserved_attributes


class Cache:
    def __init__(self) -> None:
        self.states = [torch.zeros(1)]
        self.length = 0


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.weight = nn.Parameter(torch.ones(2))
        self.table = torch.arange(3)
        self.sizes = (3, 3)
        self.flag = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.again = self.child
        self.log: dict[str, list[torch.Tensor]] = {"loss": [torch.tensor(1.0)]}
        self.cache = Cache()


def test_tensors_are_those_of_buffers_attributes_containers_and_objects_each_once_and_no_parameters() -> None:
    model = Model()
    found = Contents.of(model).state_tensors()
    expected = [model.child.mean, model.child.table, model.log["loss"][0], model.cache.states[0]]
    assert sorted(map(id, found)) == sorted(map(id, expected))


def test_containers_are_found_within_each_other_and_within_objects() -> None:
    model = Model()
    found = {id(container) for container in Contents.of(model).containers}
    assert {id(model.log), id(model.log["loss"]), id(vars(model.cache)), id(model.cache.states)} <= found


def test_modules_are_named_once_and_scripted_ones_are_closed() -> None:
    model = nn.Sequential(Model(), torch.jit.script(nn.Linear(2, 2)))
    assert Contents.of(model).modules == [model, model[0], model[0].child]


def test_a_container_that_holds_itself_ends() -> None:
    model = Model()
    model.log["all"] = [model.log]  # type: ignore[list-item]
    assert len({id(c) for c in Contents.of(model).containers}) == len(Contents.of(model).containers)


def test_the_parts_of_objects_are_followed_so_deep_and_no_deeper() -> None:
    lists = [[index] for index in range(6)]
    held = None
    for content in reversed(lists):
        held = SimpleNamespace(content=content, below=held)
    model = nn.Module()
    model.held = held  # type: ignore[assignment]
    found = {id(container) for container in Contents.of(model).containers}
    assert [id(content) in found for content in lists] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_what_a_dict_held_is_the_same_in_another_order_too(kind: type) -> None:
    model = nn.Module()
    model.table = kind(a=torch.zeros(1), b=torch.ones(1))  # type: ignore[assignment]
    with preserved_attributes(model) as holds:
        first = model.table.pop("a")
        assert not holds()
        # Now it is last.
        model.table["a"] = first
        assert holds()
        model.table["a"] = first.clone()
        assert not holds()
    assert model.table["a"] is first
