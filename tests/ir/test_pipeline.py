"""pipeline: passes in order, checked after each; an error says where."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import name_of, run
from tests.support.graphs import captured, model


def graph() -> fx.GraphModule:
    return captured(model(lambda self, x: x.relu()), x=torch.randn(2))


def to_tanh(gm: fx.GraphModule) -> list[Edit]:
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "relu":
            node.target = "tanh"
            return [Edit("relu", "change", "tanh")]
    return [Edit.unsupported("relu", "there is none")]


def broken(gm: fx.GraphModule) -> list[Edit]:
    gm.graph.get_attr("nothing")
    next(node for node in gm.graph.nodes if node.op == "output").args = (fx.Graph().placeholder("elsewhere"),)
    return []


def failing(gm: fx.GraphModule) -> list[Edit]:
    raise ValueError("no")


def test_edits_are_collected_in_order_and_the_module_runs_the_new_graph() -> None:
    gm, x = graph(), torch.randn(2)
    edits = run(gm, [to_tanh, to_tanh])
    assert [(edit.verb, edit.declined) for edit in edits] == [("change", False), ("skip", True)]
    assert torch.equal(gm(x), x.tanh())


def test_no_passes_no_edits() -> None:
    assert run(graph(), []) == []


def test_an_error_names_its_pass_and_those_before() -> None:
    with pytest.raises(ValueError) as raised:
        run(graph(), [to_tanh, to_tanh, failing])
    assert raised.value.__notes__ == ["in pass failing, after to_tanh, to_tanh"]
    with pytest.raises(ValueError) as raised:
        run(graph(), [functools.partial(failing)])
    assert raised.value.__notes__ == ["in pass failing, after none"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_a_graph_that_a_pass_broke_is_found_at_once() -> None:
    with pytest.raises(RuntimeError) as raised:
        run(graph(), [broken, failing])
    assert raised.value.__notes__ == ["in pass broken, after none"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_a_graph_that_a_pass_broke_is_found_after_the_last_where_nobody_asks_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OCTAV_FX_VERIFY")
    with pytest.raises(RuntimeError, match="Argument"):
        run(graph(), [broken, to_tanh])


def test_the_name_of_a_pass_with_options() -> None:
    assert name_of(functools.partial(failing, 1)) == "failing"
    assert name_of(to_tanh) == "to_tanh"


def test_a_dump_is_the_graph_before_and_after_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAV_FX_DUMP", str(tmp_path / "dump"))
    run(graph(), [to_tanh, to_tanh])
    run(graph(), [])
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == ["000", "001"]
    first = tmp_path / "dump" / "000"
    texts = {path.name: path.read_text() for path in first.iterdir()}
    relu, tanh = "relu = x.relu()\nreturn relu\n", "relu = x.tanh()\nreturn relu\n"
    summary = texts.pop("summary.txt").splitlines()
    assert texts == {
        "00-to_tanh.before.txt": relu,
        "00-to_tanh.after.txt": tanh,
        "01-to_tanh.before.txt": tanh,
        "01-to_tanh.after.txt": tanh,
    }
    assert [re.sub(r" +[0-9.]+ ms +", " ", line).split() for line in summary] == [
        ["00-to_tanh", "1", "edits"],
        ["relu", "change", "tanh"],
        ["01-to_tanh", "1", "edits"],
        ["relu", "skip", "there", "is", "none"],
    ]


def test_a_dump_has_what_a_failing_pass_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAV_FX_DUMP", str(tmp_path))
    with pytest.raises(ValueError):
        run(graph(), [to_tanh, failing])
    assert (tmp_path / "000" / "01-failing.before.txt").read_text() == "relu = x.tanh()\nreturn relu\n"
    assert (tmp_path / "000" / "summary.txt").read_text().endswith("failed\n")


@pytest.mark.slow
def test_several_runs_find_numbers_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAV_FX_DUMP", str(tmp_path))
    (tmp_path / "000").mkdir()
    (tmp_path / "002").mkdir()
    for _ in range(2):
        run(graph(), [to_tanh])
    # Another process may have taken 002 between the count and the mkdir.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "002", "003", "004"]


def test_off_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAV_FX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run(graph(), [to_tanh])
    assert list(tmp_path.iterdir()) == []
