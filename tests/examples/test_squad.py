"""The SQuAD recipe, end to end on a tiny file and a tiny BERT with random weights; windows, answers and scores."""

import csv
import json
import shutil

import pytest
import torch
from torch import nn

from examples.common.distributed import process_group
from examples.squad import train as squad
from examples.squad.data import DOC_STRIDE, MAX_QUESTION, Question, Window, Windows, read, windows
from examples.squad.score import MAX_ANSWER, answer, exact_match, f1, normalized, scores
from octav_fx import OctavError, zoo
from tests.examples import tinysquad, torchrun
from tests.examples.tinysquad import QUESTIONS, VOCABULARY, entry, file

zoo.torchvision()
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tinysquad.write(tmp_path_factory.mktemp("squad") / "data")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tinysquad.bert(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def tokenizer(bert):
    return transformers.AutoTokenizer.from_pretrained(str(bert))


def arguments(data, bert, out, *more, batch=4):
    fixed = f"--device cpu --max-seq 32 --lr 1e-3 --batch {batch}".split()
    return [str(value) for value in (data, "--model", bert, "--out", out, *fixed, *more)]


def curve(out):
    with (out / "curve.csv").open() as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


@pytest.fixture(scope="module")
def whole(data, bert, tmp_path_factory):
    """An uninterrupted quantized run of one process."""
    out = tmp_path_factory.mktemp("whole")
    assert squad.main(arguments(data, bert, out)) == curve(out)
    return out


def test_a_run(data, bert, whole):
    rows = curve(whole)
    assert len(rows) == 2
    assert rows[1]["loss"] < rows[0]["loss"]
    assert all(row["questions"] == QUESTIONS["dev-v1.1.json"] for row in rows)
    found = torch.load(whole / "checkpoint.pt", weights_only=True)["model"]
    model = transformers.BertForQuestionAnswering.from_pretrained(str(bert))
    model.load_state_dict(found, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
def test_stopped_and_resumed(data, bert, whole, tmp_path, step):
    with torchrun.stopped_at(step):
        squad.main(arguments(data, bert, tmp_path, "--save-every", 1))
    squad.main(arguments(data, bert, tmp_path, "--save-every", 1))
    assert curve(tmp_path) == curve(whole)


@pytest.mark.ranks
def test_two_ranks_of_fsdp2_train_what_one_process_with_their_windows_does(data, tmp_path):
    """In float: a quantizer's clip is that of the batch of its rank. Without dropout: each rank draws its own."""
    bert, one, two = tinysquad.bert(tmp_path / "bert", dropout=0.0), tmp_path / "one", tmp_path / "two"
    squad.main(arguments(data, bert, one, "--float"))
    torchrun.torchrun("examples.squad.train", arguments(data, bert, two, "--float", "--parallel", "fsdp2", batch=2))
    for expected, found in zip(curve(one), curve(two), strict=True):
        # Sums in another order; Adam makes a whole step of a gradient that is zero but for its roundings, which is that
        # of the keys' biases, on which no output depends.
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert found == expected


def test_a_pretrained_model_gets_a_head_and_needs_no_more_than_a_vocabulary(data, bert, tmp_path):
    folder = tmp_path / "pretrained"
    config = transformers.AutoConfig.from_pretrained(str(bert))
    transformers.BertForPreTraining(config).save_pretrained(str(folder))
    shutil.copy(bert / "vocab.txt", folder)
    rows = [squad.main(arguments(data, folder, tmp_path / name, "--epochs", 1)) for name in ("one", "two")]
    # The head is random, by the seed.
    assert rows[0] == rows[1]
    (folder / "vocab.txt").unlink()
    with pytest.raises(SystemExit, match=r"no vocab\.txt or tokenizer\.json in .*pretrained"):
        squad.main(arguments(data, folder, tmp_path / "three"))


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero():
    found = [squad.learning_rate(step, 100, 1.0) for step in range(100)]
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert found[99] == pytest.approx(1 / 90)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("An apple a day", "apple day"),
        ("theatre and a-b", "theatre and ab"),
        ("U.S. \t'quoted'\n", "us quoted"),
        ("the", ""),
        # Not among the punctuation of the official script, which is ASCII's.
        ("“Ärger”", "“ärger”"),
    ],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("found", "truth", "exact", "overlap"),
    [
        ("The cat.", "cat", 1, 1),
        ("red cat", "the red dog", 0, 1 / 2),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),
        ("one", "one two three", 0, 1 / 2),
        ("bird", "dog", 0, 0),
        # The official script, too, finds no word in common where there is none.
        ("a", "the", 1, 0),
    ],
)
def test_exact_match_and_f1(found, truth, exact, overlap):
    assert exact_match(found, truth) == exact
    assert f1(found, truth) == pytest.approx(overlap)


def test_scores_take_the_best_answer_and_count_what_was_not_found():
    questions = [Question(str(i), "?", "c", (("red cat", 0), ("dog", 0))) for i in range(4)]
    found = scores(questions, {0: "a dog", 1: "cat", 3: "bird"})
    assert found == {"exact_match": 25, "f1": pytest.approx(100 * (1 + 2 / 3) / 4), "questions": 4}


def window(tokens=8, first=2):
    """Tokens of one letter each; those before `first` and the last are not of the context."""
    characters = torch.full((tokens, 2), -1)
    for i in range(first, tokens - 1):
        characters[i] = torch.tensor([i - first, i - first + 1])
    return Window(0, torch.zeros(3, tokens), characters, (0, 0))


def logits(length, **high):
    found = torch.zeros(length)
    for place, value in high.items():
        found[int(place[1:])] = value
    return found


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ({"t3": 5}, {"t4": 4}, (9, "bc")),
        ({"t3": 5}, {"t3": 4}, (9, "b")),
        # An end before the start is no span: the better of the two pairs that are left.
        ({"t5": 5, "t2": 3}, {"t3": 4}, (7, "ab")),
        # The question and [SEP] are no answer, however sure.
        ({"t0": 99, "t2": 1}, {"t7": 99, "t6": 1}, (2, "abcde")),
    ],
)
def test_the_best_span(start, end, expected):
    assert answer(window(), "abcdefgh", logits(8, **start), logits(8, **end)) == expected


def test_a_span_is_not_too_long_and_a_window_without_context_has_none():
    long = window(tokens=60)
    start, end = logits(60, t2=9), logits(60, **{f"t{2 + MAX_ANSWER}": 9, f"t{1 + MAX_ANSWER}": 2})
    context = "x" * 60
    assert answer(long, context, start, end) == (11, "x" * MAX_ANSWER)
    assert answer(window(first=7), "abc", torch.zeros(8), torch.zeros(8)) is None


def question(context, text, asked="What is red?"):
    return Question("id", asked, context, ((text, context.index(text)),))


def text_of(found, context):
    first, last = found.answer
    return context[int(found.characters[first, 0]) : int(found.characters[last, 1])]


def test_windows_begin_a_stride_apart_and_know_their_answer(tokenizer):
    words = [VOCABULARY[5 + i % 10] for i in range(400)]
    words[300] = "Reds"
    context = " ".join(words)
    found = windows([question(context, "Reds")], tokenizer, 200, is_training=True)
    # [CLS] what is red ? [SEP] ... [SEP]
    room = 200 - 4 - 3
    # Where each window's first word is in the context.
    begins = [context[: int(one.characters[6, 0])].count(" ") for one in found]
    assert begins == [0, DOC_STRIDE, 2 * DOC_STRIDE]
    assert all(one.inputs.shape == (3, 200) for one in found)
    inside = [begin <= 300 < begin + room for begin in begins]
    assert [one.answer != (0, 0) for one in found] == inside == [False, True, True]
    assert {text_of(one, context) for one in found[1:]} == {"Reds"}
    # [CLS] and the question: type 0; the context and its [SEP]: type 1; padding: no attention.
    assert found[0].inputs[1].tolist() == [0] * 6 + [1] * (room + 1)
    assert int(found[-1].inputs[2].sum()) == 6 + (401 - 2 * DOC_STRIDE) + 1


def test_answers_with_blanks_around_them_and_questions_that_are_too_long(tokenizer):
    context = "The red cat. Blue dog"
    (found,) = windows([question(context, " Blue ")], tokenizer, 40, is_training=True)
    assert text_of(found, context) == "Blue"
    asked = " ".join(["what"] * (MAX_QUESTION + 10))
    (found,) = windows([question(context, "cat", asked)], tokenizer, 100, is_training=True)
    assert int((found.inputs[0] == VOCABULARY.index("what")).sum()) == MAX_QUESTION
    with pytest.raises(OctavError, match="question id: 64 tokens leave no room for a context in 66"):
        windows([question(context, "cat", asked)], tokenizer, 66, is_training=True)
    with pytest.raises(OctavError, match="question id: a training question needs an answer"):
        windows([Question("id", "What?", context, ())], tokenizer, 40, is_training=True)


class Points(nn.Module):
    """Logits that point at one word, more so in later windows: those that lack the first word of the context."""

    def __init__(self, word, begin):
        super().__init__()
        self.word, self.begin = VOCABULARY.index(word), VOCABULARY.index(begin)

    def forward(self, input_ids, token_type_ids, attention_mask):
        later = 1 + (input_ids != self.begin).all(1, keepdim=True)
        found = (input_ids == self.word) * later.float()
        return {"start_logits": found, "end_logits": found}


def test_the_best_of_all_windows_answers_a_question(tokenizer):
    # "tree" is once in the first window and, with another ending, once in the last.
    first, last = "hill tree " + "cat " * 40, "dog " * 10 + "trees"
    asked = [question(first + last, "dog", "What?"), question("hill bird tree", "bird", "What?")]
    unseen = Windows(windows(asked, tokenizer, 40, is_training=False))
    assert len(unseen) == 3
    with process_group("cpu") as ranks:
        found = squad.answers(Points("tree", "hill"), unseen, asked, ranks, 2)
    assert found[1] == "tree"
    place = first.index("tree"), (first + last).index("trees")
    assert found[0] == (first + last)[place[1] : place[1] + 4]


def broken(data, what):
    tinysquad.write(data)
    path = data / "dev-v1.1.json"
    found = file(entry("Red cat.", "a", "What?", "cat"))
    asked = found["data"][0]["paragraphs"][0]["qas"][0]
    if what == "no file":
        path.unlink()
        return
    if what == "no data":
        del found["data"]
    elif what == "no question":
        del asked["question"]
    elif what == "answer elsewhere":
        asked["answers"][0]["answer_start"] = 1
    elif what == "empty":
        found["data"] = []
    path.write_text("{" if what == "no JSON" else json.dumps(found))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no file", r"no dev-v1\.1\.json in .*\nexpected:\n  DATA/train-v1\.1\.json\n  DATA/dev-v1\.1\.json"),
        ("no JSON", r"dev-v1\.1\.json: no JSON: (?s:.*)\"paragraphs\""),
        ("no data", r"dev-v1\.1\.json: no 'data' that is a list\nexpected, as in train-v1\.1\.json"),
        ("no question", r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: no 'question' that is a str"),
        ("answer elsewhere", r"qas\[0\]\.answers\[0\]: the context does not have 'cat' at character 1"),
        ("empty", r"dev-v1\.1\.json: no question"),
    ],
)
def test_data_that_is_missing_or_misshapen(tmp_path, bert, what, says):
    broken(tmp_path / "data", what)
    with pytest.raises(SystemExit, match=says):
        squad.main(arguments(tmp_path / "data", bert, tmp_path / "out"))


def test_models_that_are_missing_or_do_not_fit(tmp_path, data, bert):
    with pytest.raises(
        SystemExit, match=r"no config\.json in .*absent\nexpected:\n  FOLDER/config\.json\n  FOLDER/vocab"
    ):
        squad.main(arguments(data, tmp_path / "absent", tmp_path / "out"))
    with pytest.raises(SystemExit, match="--max-seq 300: the model has 256 positions"):
        squad.main([*arguments(data, bert, tmp_path / "out"), "--max-seq", "300"])


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(file(entry("Red cat.", "a", "What?", "cat", "Red cat"), entry("A dog", "b", "Who?"))))
    found = read(path)
    assert found[0] == Question("a", "What?", "Red cat.", (("cat", 4), ("Red cat", 0)))
    assert found[1].answers == ()
