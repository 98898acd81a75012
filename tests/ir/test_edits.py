"""edits: what a pass says of a node, and who gets to read it."""

import pytest
import torch
from torch import fx, nn

import octav_fx
from octav_fx.capture.modules import quantized_modules
from octav_fx.ir.edits import Edit, Kind, insert_captured, site_of
from octav_fx.ir.meta import fake, info, set_fake, update
from octav_fx.ir.records import graph_info


@pytest.mark.parametrize(
    ("make", "kind"), [(Edit.by_config, Kind.BY_CONFIG), (Edit.unsupported, Kind.UNSUPPORTED), (Edit.info, Kind.INFO)]
)
def test_what_is_declined_names_a_node_by_its_site(make, kind):
    node = fx.Graph().placeholder("x")
    assert make("fc", "why", "weight") == Edit("fc", "skip", "why", "weight", kind)
    assert make(node, "why").node == "x"
    update(node, site="block.fc")
    assert make(node, "why") == Edit("block.fc", "skip", "why", None, kind) and make(node, "why").declined
    assert not Edit("fc", "fold", "norm").declined


def test_notes_tell_what_has_no_row_whatever_the_words():
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()
    config = octav_fx.Config(fold_batchnorm=True, overrides={"4": None})
    (q,) = quantized_modules(octav_fx.quantize(model, x, config))
    assert graph_info(q).notes == ("2: not folded: its input _1 is not a convolution or linear layer",)
    assert [r.reason for r in q.records if r.quantizer is None] == ["override '4': None"] * 2


def test_a_call_is_inserted_with_its_value_and_its_work():
    graph = fx.Graph()
    x = graph.placeholder("x")
    set_fake(x, torch.ones(2, 3))
    product = insert_captured(graph, torch.matmul, x, insert_captured(graph, "transpose", x, 0, 1))
    assert fake(product).shape == (2, 2) and info(product).macs == 12 and site_of(product) == product.name
    padded = insert_captured(graph, nn.functional.pad, x, (1, 1), value=2.0)
    assert padded.kwargs == {"value": 2.0} and fake(padded)[0, 0] == 2
