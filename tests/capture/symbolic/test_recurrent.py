"""Recurrent layers: linear steps where asked for, else float rows with their true work."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.errors import OctavError
from tests.support.alike import quantized_alike
from tests.support.graphs import model

LAYERS: dict[str, nn.Module] = {
    "LSTM": nn.LSTM(8, 6, 2, dropout=0.0),
    "LSTM both ways, batch first": nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
    "LSTM with projections": nn.LSTM(8, 6, proj_size=3, bias=False),
    "LSTM with projections both ways": nn.LSTM(8, 6, 2, proj_size=3, bidirectional=True),
    "GRU": nn.GRU(8, 6, 2, bidirectional=True),
    "GRU batch first": nn.GRU(8, 6, batch_first=True, bias=False),
    "RNN": nn.RNN(8, 6, 2),
    "RNN with relu": nn.RNN(8, 6, nonlinearity="relu", bidirectional=True),
}


def work(layer: Any, vectors: int) -> int:
    """Each vector meets each weight once."""
    return vectors * sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_unrolled_layers(name: str) -> None:
    layer = LAYERS[name]
    # Two inputs of the same number of steps: another number is another graph.
    first, second = (torch.randn(4, 4, 8) for _ in range(2))
    q = quantized_alike(model(lambda s, x: s.layer(x), layer=layer), (first,), (second,), recurrent="unrolled")
    macs = work(layer, 16)
    assert octav_fx.coverage(q) == octav_fx.Coverage(macs, macs, [])


@pytest.mark.parametrize("name", LAYERS)
def test_by_default_they_are_one_float_row(name: str) -> None:
    layer = LAYERS[name]
    with pytest.warns(UserWarning, match="nothing of this Model is quantized: no rule for"):
        q = octav_fx.quantize(model(lambda s, x: s.layer(x), layer=layer), torch.randn(4, 4, 8))
    ((site, reason, macs),) = octav_fx.coverage(q).skipped
    assert (site, reason, macs) == ("layer", f"no rule for {type(layer).__name__}", work(layer, 16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_state_and_no_batch(kind: type[nn.Module]) -> None:
    h = torch.randn(2, 6)
    given = (h, torch.randn(2, 6)) if kind is nn.LSTM else h
    float_model = model(lambda s, x, state: s.layer(x, state), layer=kind(8, 6, 2))
    quantized_alike(float_model, (torch.randn(5, 8), given), (torch.randn(5, 8), given), recurrent="unrolled")


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.slow
def test_cells(kind: type[nn.Module]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        state = s.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            state = s.cell(x[:, t], state)
        return state

    cell = kind(8, 6)
    q = quantized_alike(
        model(forward, cell=cell), (torch.randn(2, 5, 8),), (torch.randn(3, 5, 8),), recurrent="unrolled"
    )
    assert octav_fx.coverage(q) == octav_fx.Coverage(work(cell, 10), work(cell, 10), [])
    with pytest.warns(UserWarning, match="no rule for"):
        q = octav_fx.quantize(model(forward, cell=cell), torch.randn(2, 5, 8))
    assert octav_fx.coverage(q).total_macs == work(cell, 10)


def test_packed_sequences_stay_float() -> None:
    def forward(s: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return s.head(nn.utils.rnn.pad_packed_sequence(s.gru(packed)[0], batch_first=True)[0])

    layer = nn.GRU(8, 6, batch_first=True)
    float_model = model(forward, gru=layer, head=nn.Linear(6, 2))
    q = octav_fx.quantize(float_model, (torch.randn(2, 5, 8), torch.tensor([5, 3])), recurrent="unrolled")
    covered = octav_fx.coverage(q)
    # Eight vectors in all; the head sees ten.
    assert [(site, macs) for site, _, macs in covered.skipped] == [("gru", work(layer, 8))]
    assert covered.quantized_macs == 10 * 12


@pytest.mark.slow
def test_a_layer_by_itself_and_in_parts() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.gru(s.fc(x))[0] if x.sum().item() < 1e9 else x

    x = torch.randn(3, 2, 8)
    quantized_alike(nn.GRU(8, 6), (x,), (torch.randn(3, 4, 8),), recurrent="unrolled")
    float_model = model(forward, gru=nn.GRU(8, 6), fc=nn.Linear(8, 8))
    q = quantized_alike(float_model, (x,), parts=True, recurrent="unrolled")
    assert octav_fx.coverage(q).skipped == []


def test_another_word_is_refused() -> None:
    with pytest.raises(OctavError, match='recurrent: \'yes\' is neither "float" nor "unrolled"'):
        octav_fx.quantize(nn.GRU(8, 6), torch.randn(3, 2, 8), recurrent="yes")
