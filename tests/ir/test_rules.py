"""rules: a row for each contraction, and no row for what does not exist."""

import pytest

from octav_fx.errors import OctavError
from octav_fx.ir.ops import CONTRACTIONS
from octav_fx.ir.rules import RULES, Role, Rule, activation, either, table, weight


def test_every_contraction_has_a_rule() -> None:
    assert set(RULES) == {op.name for op in CONTRACTIONS}


def test_two_rules_for_one_op_are_an_error() -> None:
    with pytest.raises(OctavError, match=r"rule for 'linear': a second one"):
        table(Rule("linear", (activation(0, "input"),)), Rule("linear", (weight(1, "weight", 0),)))


def test_a_rule_for_an_unknown_op_is_an_error() -> None:
    with pytest.raises(OctavError, match=r"rule for 'convolution': no such op in ir/ops.py"):
        table(Rule("convolution", (activation(0, "input"),)))


def test_operands_of_each_role() -> None:
    assert (activation(0, "x", "y").role, activation(0, "x", "y").aliases) == (Role.ACTIVATION, ("y",))
    assert (weight(1, "w", 0).role, weight(1, "w", 0).channel) == (Role.WEIGHT, 0)
    assert (either(1, "w", -1).role, either(1, "w", None).channel) == (Role.EITHER, None)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.op)
def test_operands_stand_in_order_and_have_one_name_each(rule: Rule) -> None:
    positions = [operand.index for operand in rule.operands]
    assert positions == list(range(positions[0], positions[0] + len(positions)))
    names = [name for operand in rule.operands for name in (operand.name, *operand.aliases)]
    assert len(set(names)) == len(names)
    # Activations have no channel axis.
    assert all(operand.channel is None for operand in rule.operands if operand.role is Role.ACTIVATION)
