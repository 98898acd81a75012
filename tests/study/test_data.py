"""The data of the recipes: train and test apart, the same for the same seed and step, targets that are right."""

import pytest
import torch

from benchmarks.study.data import TEST, VALIDATION
from benchmarks.study.digits import Digits
from benchmarks.study.glyphs import CHARACTERS, Glyphs, fonts, rendered
from benchmarks.study.text import Text, files, is_test, joined

MAKE = {
    "glyphs": lambda seed, judged=TEST: Glyphs(seed, 310, 1, judged),
    "text": lambda seed, judged=TEST: Text(seed, 4, 32, 8, judged),
    "digits": lambda seed, judged=TEST: Digits(seed, 16, judged),
}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_a_batch_depends_on_seed_and_step_alone(name):
    data, again = MAKE[name](0), MAKE[name](0)
    torch.manual_seed(5)
    first = data.batch(3)
    again.batch(2)
    torch.manual_seed(6)
    assert same(first, again.batch(3))
    assert not same(first, data.batch(4))
    assert not same(first, MAKE[name](1).batch(3))


@pytest.mark.slow
@pytest.mark.parametrize("judged", [TEST, VALIDATION])
@pytest.mark.parametrize("name", MAKE)
def test_what_a_net_is_judged_by_is_the_same_for_every_seed(name, judged):
    first, second = list(MAKE[name](0, judged).test()), list(MAKE[name](1, judged).test())
    assert len(first) == len(second) > 0
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("of", [fonts, files])
def test_validation_is_a_part_of_the_training_files(of):
    (train, test), (fewer, validation) = of(), of(VALIDATION)
    assert set(train) == {*fewer, *validation} and len(train) == len(fewer) + len(validation)
    assert 0.05 < len(validation) / len(train) < 0.3
    assert not set(validation) & set(test)


def test_fonts_are_apart_and_have_every_glyph():
    train, test = fonts()
    assert len(train) >= 10 and len(test) >= 4
    assert not {path.name for path in train} & {path.name for path in test}
    for glyphs in (rendered(tuple(train)), rendered(tuple(test))):
        assert glyphs.shape[1:] == (len(CHARACTERS), 64, 64) and glyphs.min() >= 0 and glyphs.max() <= 1
        # No glyph is empty, and no two of a font are equal.
        assert (glyphs.sum((2, 3)) > 20).all()
        for font in glyphs.flatten(2):
            assert len(font.unique(dim=0)) == len(CHARACTERS)


def test_glyphs_are_normal_and_their_labels_right():
    data = Glyphs(0, batch=2000, views=1)
    images, labels = data.batch(0)
    assert images.shape == (2000, 1, 32, 32)
    assert abs(images.mean()) < 0.3 and 0.7 < images.std() < 1.3
    # The nearest mean image of a class is right far more often than one time in 62.
    means = torch.stack([images[labels == label].mean(0).flatten() for label in range(len(CHARACTERS))])
    test_images, test_labels = (torch.cat(parts) for parts in zip(*data.test(), strict=True))
    nearest = torch.cdist(test_images.flatten(1), means).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.3
    assert test_labels.bincount().unique().numel() == 1


@pytest.mark.slow
def test_files_are_apart_and_their_place_is_a_hash():
    train, test = files()
    assert len(train) > 200 and not set(train) & set(test)
    assert 0.02 < len(test) / len(train) < 0.2
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in (*train, *test))
    assert is_test("copy.py") == is_test("copy.py")
    assert sum(map(is_test, (f"{i}.py" for i in range(5000)))) / 5000 == pytest.approx(0.1, abs=0.02)


def test_targets_are_the_bytes_that_follow():
    data = Text(0, batch=4, length=32, windows=8)
    train, test = (bytes(part.tolist()) for part in joined())
    for source, (x, y) in [(train, data.batch(0)), *((test, batch) for batch in data.test())]:
        assert x.shape == y.shape == (len(x), 32)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert bytes(x[1].tolist()) + bytes(y[1, -1:].tolist()) in source


@pytest.mark.slow
def test_digits_are_apart():
    parts = []
    for judged in (TEST, VALIDATION):
        data = Digits(0, 16, judged)
        ((images, labels),) = data.test()
        assert len(data.images) == len(data.labels) and len(images) == len(labels)
        parts.append((data.images, images))
    (train, test), (fewer, validation) = parts
    assert len(train) + len(test) == 1797
    assert torch.equal(torch.cat([validation, fewer]), train)
