"""meta: what is known of a node, in every dialect; and what outlives the passes."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import fx, nn

import octav_fx
from octav_fx.ir.meta import NodeInfo, State, copy_meta, fake, info, keep_site, set_fake, update
from octav_fx.ir.records import GraphInfo, graph_info, update_graph_info


def node() -> fx.Node:
    return fx.Graph().placeholder("x")


def test_nothing_is_known_of_a_new_node() -> None:
    assert info(node()) == NodeInfo() and fake(node()) is None
    assert node().meta == {}


@pytest.mark.parametrize("key", ["value", "example_value", "val"])
def test_the_fake_value_is_found_in_each_dialect(key: str) -> None:
    x = node()
    x.meta[key] = torch.ones(2)
    assert fake(x) is x.meta[key]


def test_a_known_absence_is_not_looked_for_in_another_dialect() -> None:
    x = node()
    x.meta["val"] = 1
    set_fake(x, None)
    assert fake(x) is None


def test_a_copy_of_what_is_known_goes_its_own_way() -> None:
    x, y = node(), node()
    update(x, site="a", macs=3)
    copy_meta(x, y)
    update(y, site="b")
    assert (info(x), info(y)) == (NodeInfo("a", macs=3), NodeInfo("b", macs=3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info(x).site = "c"


def test_only_the_site_outlives_the_passes() -> None:
    x, y = node(), node()
    set_fake(x, torch.ones(2))
    update(x, site="fc", macs=3, state=State("w", is_parameter=True))
    update(y, macs=3)
    keep_site(x)
    keep_site(y)
    assert info(x) == NodeInfo("fc") and list(x.meta) == ["octav"] and y.meta == {}


def test_what_is_kept_with_the_graphs_copies_and_pickles() -> None:
    x = torch.randn(3, 4)
    q = octav_fx.quantize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x).eval()
    before = graph_info(q)
    assert set(before.records) == {True, False} and before.config["weight_bits"] == 4 and before.missing is None
    q(x)
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    frozen = graph_info(q)
    assert dataclasses.replace(frozen, frozen={}) == before and set(frozen.frozen) == set(q.modes)
    assert graph_info(copy.deepcopy(q)) == frozen and graph_info(pickle.loads(pickle.dumps(q))) == frozen
    converted = octav_fx.convert(q)
    assert graph_info(pickle.loads(pickle.dumps(converted))) == graph_info(converted)
    assert dataclasses.replace(graph_info(converted), integers=()) == GraphInfo(records={False: before.records[False]})
    octav_fx.unfreeze(q)
    assert graph_info(q) == before


def test_a_module_that_nothing_is_kept_with() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    assert graph_info(gm) == GraphInfo()
    update_graph_info(gm, notes=("a",))
    assert graph_info(gm).notes == ("a",)
