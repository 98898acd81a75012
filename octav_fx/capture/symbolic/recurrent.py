"""Recurrent layers as the linear steps that they are: what is traced in their place where that is asked for.

    y, (h, c) = lstm(x)  ->  gates = linear(x, w_ih, b_ih)
                             for t: i, f, g, o = chunk(gates[t] + linear(h, w_hh, b_hh), 4)
                                    c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)

Equal to torch's own but for the rounding of sums. The number of steps is that of the example, under a check.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

_LAYERS: Final = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS: Final = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)

# From the two sums [B, gates * H] and the state to the next state; a state is a tuple, its first what is put out.
_Step = Callable[[Any, Any, tuple[Any, ...]], tuple[Any, ...]]


def is_recurrent(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's recurrent layers or cells, with the forward of its class."""
    kinds = (*_LAYERS, *_CELLS)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def unrolled(module: Any, x: Any, hx: Any = None) -> Any:
    """Compute what a recurrent layer or cell returns for x and a state, step by step."""
    return _cell(module, x, hx) if isinstance(module, _CELLS) else _layers(module, x, hx)


def _lstm(of_x: Any, of_h: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    i, f, g, o = (of_x + of_h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(of_x: Any, of_h: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + z * (state[0] - n),)


def _step_of(module: Any) -> _Step:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _lstm
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _gru
    activation = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return lambda of_x, of_h, state: (activation(of_x + of_h),)


def _cell(module: Any, x: Any, hx: Any) -> Any:
    is_lstm = isinstance(module, nn.LSTMCell)
    zeros = x.new_zeros(*x.shape[:-1], module.hidden_size) if hx is None else None
    state = ((hx[0], hx[1]) if is_lstm else (hx,)) if zeros is None else (zeros, zeros)
    of_x = F.linear(x, module.weight_ih, module.bias_ih)
    of_h = F.linear(state[0], module.weight_hh, module.bias_hh)
    new = _step_of(module)(of_x, of_h, state)
    return new if is_lstm else new[0]


def _layers(module: Any, x: Any, hx: Any) -> Any:
    is_lstm, is_batch = isinstance(module, nn.LSTM), x.dim() == 3
    x = x.transpose(0, 1) if module.batch_first and is_batch else x
    directions = 2 if module.bidirectional else 1
    states = [_initial(module, x, hx, at) for at in range(module.num_layers * directions)]
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            y, states[at] = _direction(module, x, states[at], layer, direction)
            outputs.append(y)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        if module.dropout and layer + 1 < module.num_layers:
            x = F.dropout(x, module.dropout, module.training)
    x = x.transpose(0, 1) if module.batch_first and is_batch else x
    last = tuple(torch.stack(list(parts)) for parts in zip(*states, strict=True))
    return x, last if is_lstm else last[0]


def _initial(module: Any, x: Any, hx: Any, at: int) -> tuple[Any, ...]:
    is_lstm = isinstance(module, nn.LSTM)
    if hx is not None:
        return (hx[0][at], hx[1][at]) if is_lstm else (hx[at],)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)[: 2 if is_lstm else 1]
    return tuple(x.new_zeros(*x.shape[1:-1], size) for size in sizes)


def _direction(module: Any, x: Any, state: tuple[Any, ...], layer: int, direction: int) -> tuple[Any, tuple[Any, ...]]:
    """Return the outputs [T, ..., H] of one layer in one direction, and the last state."""
    suffix = f"_l{layer}{'_reverse' if direction else ''}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found: list[Any] = [getattr(module, name + suffix, None) for name in names]
    w_ih, w_hh, b_ih, b_hh, w_hr = found
    step, of_x = _step_of(module), F.linear(x, w_ih, b_ih)
    outputs = []
    times = range(x.shape[0])
    for t in reversed(times) if direction else times:
        h, *rest = step(of_x[t], F.linear(state[0], w_hh, b_hh), state)
        state = (h if w_hr is None else F.linear(h, w_hr), *rest)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if direction else outputs), state
