"""Config: what it accepts, which override wins, JSON both ways."""

import dataclasses
import inspect
import json

import pytest

from octav_fx import Config, OctavError
from octav_fx.ir.op import Role
from octav_fx.passes import Place, choose_spec


def place(site: str, role: Role = Role.WEIGHT, edge: bool = False, signed: bool = True) -> Place:
    operand, axis = ("weight", 0) if role is Role.WEIGHT else ("input", None)
    return Place(site, "linear", operand, role, edge, signed, axis)


def test_the_defaults_are_the_papers_recipe():
    weight, activation = (
        choose_spec(Config(), place("fc")),
        choose_spec(Config(), place("fc", Role.ACTIVATION, signed=False)),
    )
    assert (str(weight.spec), weight.method, weight.gradient) == ("int4/channel.0", "octav", "mad")
    assert (str(activation.spec), activation.gradient) == ("uint4/tensor", "pwl")
    assert choose_spec(Config(), place("fc", edge=True)).spec.format.bits == 8


def test_edge_bits_none_is_no_exception():
    assert choose_spec(Config(edge_bits=None, weight_bits=3), place("fc", edge=True)).spec.format.bits == 3


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        ({}, 4),
        ({"layer1.0.conv": {"weight_bits": 2}}, 2),
        ({"layer1.*": {"weight_bits": 2}}, 2),
        ({"*": {"weight_bits": 2}, "layer1.*": {"weight_bits": 3}}, 3),
        ({"layer1.*": {"weight_bits": 3}, "*": {"weight_bits": 2}}, 2),
        # An exact name wins, whatever comes after it.
        ({"layer1.0.conv": {"weight_bits": 5}, "*": {"weight_bits": 2}}, 5),
        # Only the winner counts: what it does not set is the default, not the loser's.
        ({"*": {"weight_bits": 2}, "layer1.*": {"activation_bits": 3}}, 4),
        ({"layer?.[0-3].conv": {"weight_bits": 6}}, 6),
        ({"LAYER1.*": {"weight_bits": 6}}, 4),
        # The name of a module means all in it, and no other whose name begins so.
        ({"layer1": {"weight_bits": 6}}, 6),
        ({"layer": {"weight_bits": 6}}, 4),
        ({"layer1": {"weight_bits": 6}, "layer1.0": {"weight_bits": 5}}, 5),
    ],
)
def test_exact_name_then_last_matching_glob_then_default(overrides, bits):
    assert choose_spec(Config(overrides=overrides), place("layer1.0.conv")).spec.format.bits == bits


@pytest.mark.parametrize(
    ("overrides", "weight", "activation"),
    [
        ({"layer1.0.conv/weight": {"weight_bits": 6, "activation_bits": 6}}, 6, 4),
        ({"layer1.*/input": {"activation_bits": 6}}, 4, 6),
        ({"layer1/*": {"weight_bits": 6, "activation_bits": 5}}, 6, 5),
        ({"other|layer1": {"weight_bits": 6, "activation_bits": 5}}, 6, 5),
        ({"other|layer1/weight": {"weight_bits": 6, "activation_bits": 5}}, 6, 4),
        # The exact name of an operand > that of its node > the last that fits.
        ({"layer1.0.conv/weight": {"weight_bits": 6}, "layer1.0.conv": {"weight_bits": 3}, "*": {}}, 6, 4),
        ({"*/weight": {"weight_bits": 6}, "layer1": {"weight_bits": 3}}, 3, 4),
    ],
)
def test_overrides_of_one_operand_and_of_several_names(overrides, weight, activation):
    config = Config(overrides=overrides)
    assert choose_spec(config, place("layer1.0.conv")).spec.format.bits == weight
    assert choose_spec(config, place("layer1.0.conv", Role.ACTIVATION)).spec.format.bits == activation
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_class_stands_for_modules_of_a_model():
    config = Config(overrides={Config: None})
    for ask in (lambda: config.pattern_for("fc"), config.to_dict):
        with pytest.raises(OctavError, match=r"overrides\[Config\]: a class stands for modules of a model"):
            ask()


def test_an_override_wins_over_the_edge():
    config = Config(overrides={"fc": {"weight_bits": 3}})
    assert choose_spec(config, place("fc", edge=True)).spec.format.bits == 3
    assert choose_spec(config, place("fc", Role.ACTIVATION, edge=True)).spec.format.bits == 8


def test_none_leaves_a_node_float_and_says_which_pattern_did():
    assert (
        choose_spec(Config(overrides={"*": {}, "layer1.*": None}), place("layer1.0.conv"))
        == "override 'layer1.*': None"
    )
    assert (
        choose_spec(Config(overrides={"layer1.*": None, "layer1.0.conv": {}}), place("layer1.0.conv")).spec.format.bits
        == 4
    )


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "edge_bits"])
@pytest.mark.parametrize("value", [0, 1, 9, -4, 4.0, 4.5, "4", True])
def test_bits_outside_of_two_to_eight(name, value):
    message = rf"{name}={value!r}: whole bits from 2 to 8"
    with pytest.raises(OctavError, match=message):
        Config(**{name: value})
    if name != "edge_bits":
        with pytest.raises(OctavError, match=message):
            Config(overrides={"fc": {name: value}})


@pytest.mark.parametrize("value", [{}, [], None, 1, "no"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_a_value_of_another_kind_is_an_octav_error_that_names_the_field(name, value):
    if (name in ("weight_bits", "activation_bits", "edge_bits", "residual_bits") and value is None) or (
        name == "overrides" and value == {}
    ):
        return
    with pytest.raises(OctavError, match=name):
        Config(**{name: value})


@pytest.mark.parametrize("values", [[], None, 4, {1: 2}])
def test_what_is_no_dict_of_fields_is_an_octav_error(values):
    with pytest.raises(OctavError, match=r"from_dict|no field"):
        Config.from_dict(values)


@pytest.mark.parametrize("granularity", ["token", "group-16"])
def test_ranks_do_not_agree_on_the_scale_above_those_of_rows(granularity):
    fields = {"sync_clip": True, "scale_format": "e4m3"}
    with pytest.raises(OctavError, match=rf"sync_clip=True: above .* not '{granularity}'"):
        Config(**fields, activation_granularity=granularity)
    with pytest.raises(OctavError, match="overrides"):
        Config(sync_clip=True, activation_granularity=granularity, overrides={"fc": {"scale_format": "e4m3"}})
    assert Config(**fields).sync_clip
    assert Config(**fields, activation_granularity=granularity, activation_bits=None).sync_clip


def test_a_preset_that_is_no_name_is_an_octav_error():
    with pytest.raises(OctavError, match="preset=\\[\\]: one of"):
        Config.preset([])


def test_what_is_wrong_in_an_override_says_in_which():
    with pytest.raises(OctavError, match=r"overrides\['layer1.\*'\]: weight_bits=99: whole bits"):
        Config(overrides={"fc": {"weight_bits": 8}, "layer1.*": {"weight_bits": 99}})


@pytest.mark.parametrize(("name", "role"), [("weight_bits", Role.WEIGHT), ("activation_bits", Role.ACTIVATION)])
def test_bits_of_none_leave_a_role_float(name, role):
    for config in (Config(**{name: None}), Config(overrides={"fc": {name: None}})):
        assert choose_spec(config, place("fc", role, edge=True)) == f"{name}=None"
    other = Role.ACTIVATION if role is Role.WEIGHT else Role.WEIGHT
    assert choose_spec(Config(**{name: None}), place("fc", other)).spec.format.bits == 4
    assert choose_spec(Config(**{name: None}, overrides={"fc": {name: 3}}), place("fc", role)).spec.format.bits == 3


def spec_of_fc(config: Config, role: Role, edge: bool = False) -> str:
    shape = (16, 64)
    where = dataclasses.replace(place("fc", role, edge, signed=role is Role.WEIGHT), reduction=1, shape=shape)
    return str(choose_spec(config, where).spec)


@pytest.mark.parametrize(
    ("config", "weight", "activation"),
    [
        (Config(weight_granularity="tensor"), "int4/tensor", "uint4/tensor"),
        (Config(signed_activations=True, narrow_weights=True), "int4-narrow/channel.0", "int4/tensor"),
        (Config(weight_granularity="group-32"), "int4/group-32.1", "uint4/tensor"),
        (Config(activation_granularity="token", activation_bits=8), "int4/channel.0", "uint8/token.1"),
        (Config(activation_format="e4m3"), "int4/channel.0", "e4m3/tensor"),
        (Config(activation_format="kmeans", activation_bits=3), "int4/channel.0", "kmeans3/tensor"),
        (Config.preset("w8a8"), "int8/channel.0", "uint8/tensor"),
        (Config.preset("w4a4"), "int4/channel.0", "uint4/tensor"),
        (Config.preset("w4a8-g32-token"), "int4/group-32.1", "uint8/token.1"),
        (Config.preset("w8a8-token"), "int8/channel.0", "uint8/token.1"),
        (Config.preset("mxfp4"), "e2m1/group-32.1/e8m0", "e2m1/group-32.1/e8m0"),
        (Config.preset("mxfp8"), "e4m3/group-32.1/e8m0", "e4m3/group-32.1/e8m0"),
        (Config.preset("nvfp4"), "e2m1/group-16.1/e4m3", "e2m1/group-16.1/e4m3"),
        (Config.preset("ternary-a8"), "ternary/channel.0", "uint8/tensor"),
        (Config.preset("tensorrt"), "int8-narrow/channel.0", "int8/tensor"),
        (Config(overrides={"f*": {"weight_granularity": "group-16"}}), "int4/group-16.1", "uint4/tensor"),
    ],
)
def test_formats_granularities_and_presets(config, weight, activation):
    assert spec_of_fc(config, Role.WEIGHT) == weight
    assert spec_of_fc(config, Role.ACTIVATION) == activation
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_edges_are_integers_without_groups():
    assert spec_of_fc(Config.preset("nvfp4"), Role.WEIGHT, edge=True) == "int8/channel.0"
    assert spec_of_fc(Config.preset("nvfp4"), Role.ACTIVATION, edge=True) == "uint8/tensor"
    assert spec_of_fc(Config.preset("w4a8-g32-token"), Role.ACTIVATION, edge=True) == "uint8/token.1"
    asked = Config(weight_granularity="group-32", overrides={"fc": {"weight_granularity": "group-32"}})
    assert spec_of_fc(asked, Role.WEIGHT, edge=True) == "int8/group-32.1"


def test_groups_that_do_not_come_out_even():
    message = (
        r"fc: weight of shape \(16, 64\) has 64 elements along axis 1, which groups of 48 do not divide; .*'fc': None"
    )
    with pytest.raises(OctavError, match=message):
        spec_of_fc(Config(weight_granularity="group-48"), Role.WEIGHT)
    with pytest.raises(OctavError, match=r"fc: weight of shape .* has no one axis that linear sums over"):
        choose_spec(Config(weight_granularity="group-48"), place("fc"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_format": "fp4"}, "weight_format='fp4': one of 'int', 'kmeans', 'e2m1'"),
        ({"weight_granularity": "token"}, "weight_granularity='token': one of 'tensor', 'channel', 'group-32'"),
        ({"activation_granularity": "channel"}, "activation_granularity='channel': one of 'tensor', 'token', 'group"),
        ({"weight_granularity": "group-0"}, "weight_granularity='group-0'"),
        ({"weight_granularity": "group-32.1"}, "weight_granularity='group-32.1'"),
        ({"weight_granularity": 32}, "weight_granularity=32"),
        ({"scale_format": "int8"}, "scale_format='int8': one of 'float32'"),
        ({"signed_activations": 1}, "signed_activations=1: True or False"),
        (
            {"clip": "octav-grid", "weight_format": "e2m1"},
            "clip='octav-grid' is for evenly spaced levels",
        ),
        ({"clip": "octav-tight", "narrow_weights": True}, "clip='octav-tight' counts on the lowest code"),
        ({"weight_format": "kmeans"}, "weight_format='kmeans' .* in a tensor: weight_granularity='channel'"),
        ({"activation_format": "kmeans", "activation_bits": 8}, "2 to 4 bits of them: activation_bits=8"),
        ({"activation_format": "kmeans", "clip": "max"}, "activation_format='kmeans' .* clip='max' asks for others"),
        ({"activation_format": "kmeans", "clip": "pact"}, "clip='pact' asks for others; give 'octav' or 'mse'"),
        ({"activation_format": "kmeans", "scale_format": "e8m0"}, "as float32: scale_format='e8m0'"),
        ({"weight_bits": 3, "weight_format": "nf4"}, "weight_bits=3 with weight_format='nf4', which has 4 bits: leave"),
        ({"activation_bits": 8, "activation_format": "e2m1"}, "activation_format='e2m1', which has 4 bits"),
        # The default is refused where somebody gives it.
        (
            {"weight_format": "e4m3", "overrides": {"fc": {"weight_bits": 4}}},
            r"overrides\['fc'\]: weight_bits=4 with weight_format='e4m3', which has 8 bits",
        ),
        ({"clip": "lsq", "activation_granularity": "token"}, "clip='lsq': the rows of activation_granularity='token'"),
        ({"clip": "pact", "scale_format": "e8m0"}, "clip='pact': a learned clip is float32, not 'e8m0'"),
        ({"sync_clip": True, "activation_format": "e4m3"}, "sync_clip=True: the clip of 'e4m3' needs all values"),
    ],
)
def test_what_does_not_combine(values, message):
    with pytest.raises(OctavError, match=message):
        Config(**values)


def test_bits_beside_a_format_with_bits_of_its_own():
    # Not given, its own, or none at all.
    for bits in ({}, {"weight_bits": 8}, {"weight_bits": None}):
        assert Config(weight_format="e4m3", **bits).weight_format == "e4m3"
    # The bits of all others are not those of one with such a format, nor is its format that of one with bits.
    config = Config(weight_bits=8, overrides={"a": {"weight_format": "nf4"}, "b": {"activation_bits": 8}})
    assert choose_spec(config, place("a")).spec.format.name == "nf4"
    config = Config(weight_format="nf4", overrides={"a": {"weight_format": "int", "weight_bits": 6}})
    assert choose_spec(config, place("a")).spec.format.name == "int6"


def test_a_preset_by_an_unknown_name():
    with pytest.raises(OctavError, match="preset='w3': one of 'w8a8', 'w4a4'"):
        Config.preset("w3")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        (
            "clip",
            (
                *("octav", "octav-grid", "octav-tight", "max", "percentile", "percentile-99.9"),
                *("percentile-99.99", "percentile-99.999", "mse", "pact", "lsq"),
            ),
        ),
        ("weight_gradient", ("ste", "pwl", "mad")),
        ("activation_gradient", ("ste", "pwl", "mad")),
        ("attention", ("operands",)),
    ],
)
def test_choices(name, allowed):
    for value in allowed:
        assert getattr(Config(**{name: value}), name) == value
    for value in ("OCTAV", "", None, 4):
        with pytest.raises(OctavError, match=f"{name}={value!r}: one of '{allowed[0]}'"):
            Config(**{name: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"fc": {"bits": 4}},
            r"overrides\['fc'\]: unknown \['bits'\]; a node can set weight_bits, activation_bits, clip",
        ),
        ({"fc": {"edge_bits": 4}}, r"unknown \['edge_bits'\]"),
        ({"fc": {"overrides": {}}}, r"unknown \['overrides'\]"),
        ({"fc": {"clip": "none"}}, "clip='none': one of"),
        ({"fc": {"weight_gradient": "none"}}, "weight_gradient='none': one of"),
        ({"fc": 4}, "4 is not a dict or None"),
        ({"fc": "float"}, "'float' is not a dict or None"),
        ({3: None}, r"overrides\[3\]: no name and no class of modules"),
        ([("fc", None)], "overrides: a dict of node name or glob to settings"),
        (None, "overrides: a dict"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(OctavError, match=message):
        Config(overrides=overrides)


def test_learned_clips_have_the_gradient_of_their_papers():
    weight, activation = place("fc"), place("fc", Role.ACTIVATION)
    lsq, pact = Config(clip="lsq"), Config(clip="pact")
    assert [(s.method, s.gradient) for s in (choose_spec(lsq, weight), choose_spec(lsq, activation))] == [
        ("lsq", "pwl")
    ] * 2
    # PACT learns the clips of activations; weights keep theirs and their gradient.
    assert [(s.method, s.gradient) for s in (choose_spec(pact, weight), choose_spec(pact, activation))] == [
        ("max", "mad"),
        ("pact", "pwl"),
    ]
    for clip in ("lsq", "pact"):
        for gradient in ("mad", "ste"):
            with pytest.raises(OctavError, match=f"activation_gradient='{gradient}': a learned clip, clip='{clip}'"):
                Config(clip=clip, activation_gradient=gradient)
            with pytest.raises(OctavError, match=f"activation_gradient='{gradient}'"):
                Config(activation_gradient=gradient, overrides={"fc": {"clip": clip}})
    with pytest.raises(OctavError, match="weight_gradient='ste': clip='lsq'"):
        Config(clip="lsq", weight_gradient="ste")
    # What is not learned may have any.
    mixed = Config(clip="lsq", overrides={"fc": {"clip": "octav", "activation_gradient": "mad"}})
    assert choose_spec(mixed, activation).gradient == "mad"
    assert choose_spec(Config(clip="pact", weight_gradient="ste"), weight).gradient == "ste"


def test_what_is_learned():
    assert Config(clip="mse").learned is None
    assert Config(clip="pact").learned == "pact"
    assert Config(overrides={"a": None, "b": {}, "c": {"clip": "lsq"}}).learned == "lsq"


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_sync_clip_is_a_bool(value):
    with pytest.raises(OctavError, match=f"sync_clip={value!r}: True or False"):
        Config(sync_clip=value)


def test_json_both_ways():
    config = Config(
        weight_bits=3,
        edge_bits=None,
        clip="octav-grid",
        weight_gradient="ste",
        fold_batchnorm=True,
        sync_clip=True,
        overrides={"layer4.*": {"weight_bits": 2, "clip": "max"}, "fc": None},
    )
    text = json.dumps(config.to_dict())
    assert Config.from_dict(json.loads(text)) == config
    assert Config.from_dict(Config().to_dict()) == Config()
    assert Config.from_dict({"weight_bits": 3}) == Config(weight_bits=3)
    # The order of globs decides, so it has to survive.
    assert list(json.loads(text)["overrides"]) == ["layer4.*", "fc"]


def test_a_key_that_is_no_field_is_an_error():
    with pytest.raises(OctavError, match="Config has no field bits; it has weight_bits, activation_bits, edge_bits"):
        Config.from_dict({"bits": 4})
    with pytest.raises(OctavError, match="Config has no field bits; it has weight_bits, activation_bits, edge_bits"):
        Config(bits=4)
    # What help() shows and editors complete.
    assert list(inspect.signature(Config).parameters) == [field.name for field in dataclasses.fields(Config)]


def test_frozen_and_apart_from_its_dict():
    config = Config(overrides={"fc": {"weight_bits": 3}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 5
    config.to_dict()["overrides"]["fc"]["weight_bits"] = 7
    assert choose_spec(config, place("fc")).spec.format.bits == 3


def test_fields_are_the_promised_ones():
    assert {field.name: field.default for field in dataclasses.fields(Config) if field.name != "overrides"} == {
        "weight_bits": 4,
        "activation_bits": 4,
        "edge_bits": 8,
        "residual_bits": None,
        "weight_format": "int",
        "activation_format": "int",
        "weight_granularity": "channel",
        "activation_granularity": "tensor",
        "scale_format": "float32",
        "signed_activations": False,
        "narrow_weights": False,
        "clip": "octav",
        "weight_gradient": "mad",
        "activation_gradient": "pwl",
        "attention": "operands",
        "fold_batchnorm": False,
        "sync_clip": False,
    }
    assert Config().overrides == {}
