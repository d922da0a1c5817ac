"""Samples say what they claim to say: length, statements, depths, references."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.eval import grammar, load
from kvlib.eval.language import English, Question, Synthetic, default_text, language_of
from kvlib.eval.tasks import TASKS, Continuation, Niah, parse_tasks, score
from kvlib.policies import RecipeError

WORDS = grammar.vocabulary()


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny")[1]


@pytest.fixture(scope="module")
def synthetic(tokenizer):
    return language_of(tokenizer)


class Letters:
    """A tokenizer that gives every character its code point."""

    chat_template = None
    bos_token, bos_token_id = "<", ord("<")

    def __call__(self, text, add_special_tokens=True):
        start = self.bos_token if add_special_tokens else ""
        return type("Encoding", (), {"input_ids": [ord(char) for char in start + text]})

    def decode(self, ids):
        return "".join(map(chr, ids))

    def __len__(self):
        return 0x110000


def read(ids):
    return " ".join(WORDS[i] for i in ids)


def followed(context, question):
    """Answer a question of the grammar from its document, by reading it."""
    words, asked = read(context).split(), read(question).split()
    numbers = {}
    for i, word in enumerate(words):
        if word in ("key", "set"):
            numbers.setdefault(words[i + 1], []).append(" ".join(words[i + 2 : words.index(".", i)]))
    if asked[0] == "ask":
        return numbers[asked[1]]
    if asked[0] == "list":
        return [f"{name} {numbers[name][0]}" for name in asked[1:-1]]
    if asked[0] == "all":
        return numbers[asked[1]]
    if asked[0] == "trace":
        chain = [asked[1]]
        while chain[-1] in numbers:
            chain.append(numbers[chain[-1]][0])
        return chain[2:]
    at = next(i for i, w in enumerate(words) if w == "copy" and words[i + 1 : i + 3] == asked[1:])
    return [" ".join(words[at + 3 : words.index(".", at)])]


@given(
    task=st.sampled_from([t for t in TASKS if t != "continuation"]),
    length=st.integers(150, 700),
    index=st.integers(0, 50),
    low=st.floats(0, 0.5),
)
def test_a_synthetic_sample_is_exact_in_length_and_answerable(synthetic, task, length, index, low):
    sample = TASKS[task]().sample(synthetic, length, 0, index, (low, low + 0.5))
    assert len(sample.context) + len(sample.question) == length
    assert followed(sample.context, sample.question) == list(sample.references)
    assert all(low - 0.08 <= depth <= low + 0.58 for depth in sample.depths)  # the nearest border
    assert score(" ".join(sample.references), sample.references) == 1
    assert sample.tokens < 24


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.77, 1.0])
def test_needles_stand_at_their_depth_between_sentences(synthetic, depth):
    sample = Niah().sample(synthetic, 1000, 5, 3, (depth, depth))
    at = sample.context.index(grammar.KEY)
    assert abs(at / 1000 - depth) < 0.02
    assert sample.depths[0] == pytest.approx(at / 1000, abs=0.01)
    assert sample.context[at - 1] in (grammar.DOT, grammar.BOS)


def test_depths_are_spread_evenly_whatever_their_number(synthetic):
    depths = [Niah().sample(synthetic, 200, 0, i, (0, 1)).depths[0] for i in range(20)]
    for count in (5, 10, 20):
        bands = np.histogram(depths[:count], bins=5, range=(0, 1))[0]
        assert bands.min() >= count // 5 - 1


def test_samples_depend_on_seed_length_and_index_alone(synthetic):
    task = parse_tasks("multikey(keys=6)")[0]
    one = task.sample(synthetic, 300, 0, 7, (0, 1))
    assert one == task.sample(synthetic, 300, 0, 7, (0, 1))
    others = [task.sample(synthetic, 300, 1, 7, (0, 1)), task.sample(synthetic, 300, 0, 8, (0, 1))]
    assert all(one.context != other.context for other in others)


@given(task=st.sampled_from([t for t in TASKS if t != "continuation"]), index=st.integers(0, 20))
def test_an_english_sample_is_exact_and_states_its_facts(task, index):
    language = English(Letters(), default_text()[:20000])
    sample = TASKS[task]().sample(language, 1200, 0, index, (0, 1))
    context = "".join(map(chr, sample.context))
    assert len(sample.context) + len(sample.question) == 1200
    assert context.startswith("<Read the text")
    for reference in sample.references:
        assert reference in context
    for at in (m.start() for m in re.finditer("\n(The|One of the) (magic|value)|\nRemember", context)):
        last = context.index("\n", at + 1) == len(context) - 1  # where the text was cut
        assert last or context[at - 1] in ".!?\n"


def test_questions_name_what_was_stated():
    language = English(Letters(), default_text()[:20000])
    sample = parse_tasks("multiquery(queries=2)")[0].sample(language, 1000, 0, 0, (0, 1))
    question = "".join(map(chr, sample.question))
    names = re.findall(r"magic number of (\w+) is \d", "".join(map(chr, sample.context)))
    assert all(name in question for name in names) and len(names) == 2
    assert not any(reference in question for reference in sample.references)


def test_a_chat_template_frames_the_text():
    class Chat(Letters):
        chat_template = "yes"

        def apply_chat_template(self, chat, tokenize, add_generation_prompt):
            return f"[{chat[0]['role']}]{chat[0]['content']}[/]"

    before, after = English(Chat(), "text").frame(Question("Why?", "Because", "", ()))
    assert "".join(map(chr, before)).startswith("[user]Read")
    assert "".join(map(chr, after)).endswith("Why?[/]Because")


def test_a_continuation_is_contiguous(synthetic):
    sample = Continuation(8).sample(synthetic, 100, 0, 0, (0, 1))
    assert (len(sample.context), len(sample.question)) == (100, 9)
    text = default_text()[:5000]
    sample = Continuation(8).sample(English(Letters(), text), 100, 0, 0, (0, 1))
    assert "".join(map(chr, sample.context[1:] + sample.question)) in text


@pytest.mark.parametrize("text", ["\u8bcd" * 3000, "word " * 3000, ("a. " + "word " * 300) * 10])
@pytest.mark.parametrize("depth", [0.2, 0.5, 0.9])
def test_depths_are_true_where_sentences_are_rare(text, depth):
    sample = Niah().sample(English(Letters(), text), 1000, 0, 0, (depth, depth))
    context = "".join(map(chr, sample.context))
    start = context.index("\n\n") + 2
    hay = len(context) - start - len("\nThe magic number of Oslo is 1234.\n")
    at = (context.index("\nThe magic") - start) / hay
    assert at == pytest.approx(sample.depths[0], abs=0.01)
    assert at == pytest.approx(depth, abs=0.08)


def test_sentences_end_before_a_space_and_lines_end_anywhere():
    text = "See sys.exc_info. Then 3.8 is out!  Done\nnext\u3002\u8bcd"
    breaks = English(Letters(), text)._breaks.tolist()
    assert [text[:at] for at in breaks] == [
        "See sys.exc_info.",
        "See sys.exc_info. Then 3.8 is out!",
        "See sys.exc_info. Then 3.8 is out!  Done\n",
        "See sys.exc_info. Then 3.8 is out!  Done\nnext\u3002",
    ]


def test_no_reference_is_a_first_token_alone(synthetic, tokenizer):
    """An aware answer's first token comes from the prompt's own attention and may not count."""

    class Words(Letters):
        """A token for every word or number and what is before it."""

        def __call__(self, text, add_special_tokens=True):
            pieces = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
            return type("Encoding", (), {"input_ids": [hash(piece) % 2**40 for piece in pieces]})

        def decode(self, ids):
            return ". "

    english = English(Words(), default_text()[:20000])
    for language in (synthetic, english):
        for name in (t for t in TASKS if t != "continuation"):
            rng = np.random.default_rng(0)
            for _ in range(10):
                question = TASKS[name]().facts(language, rng).question
                first = question.answer.split()[0].strip(".,")
                if language is english and name in ("niah", "multikey", "multivalue", "multiquery"):
                    assert len(question.references[0]) == 7  # numbers that one token holds are drawn longer
                else:
                    assert first not in question.references


def test_score_is_the_share_of_references_said():
    assert score("it is 46485.", ("4648",)) == 0
    assert score("it is 4648.", ("4648",)) == 1
    assert score("it is 12 34 , 56\n78 .", ("12 34", "56 78", "90 12")) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nia", "did you mean 'niah'"),
        ("multikey(keys=1)", "multikey(keys=1): give a whole number, 2 or more"),
        ("multikey(key=4)", "did you mean 'keys'"),
        ("niah +", "cannot read"),
    ],
)
def test_bad_tasks_name_the_value_and_the_remedy(text, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_tasks(text)


def test_tasks_are_read_once_each_and_written_back():
    found = parse_tasks("niah, multikey(keys=2),niah")
    assert [str(task) for task in found] == ["niah", "multikey(keys=2)"]
    assert parse_tasks([str(task) for task in found]) == found


def test_what_does_not_fit_is_refused(synthetic, tokenizer):
    with pytest.raises(ValueError, match="give lengths of 219 or more"):
        parse_tasks("multikey(keys=40)")[0].sample(synthetic, 100, 0, 0, (0, 1))
    with pytest.raises(ValueError, match="give lengths of 219 or more"):
        parse_tasks("multikey(keys=40)")[0].check(synthetic, 100, 0, 3)
    with pytest.raises(ValueError, match="300 different names are needed and there are 256"):
        parse_tasks("multikey(keys=300)")[0].sample(synthetic, 4000, 0, 0, (0, 1))
    with pytest.raises(ValueError, match="give a longer text"):
        Niah().sample(English(Letters(), "too short"), 500, 0, 0, (0, 1))
    with pytest.raises(ValueError, match="leave the text out"):
        language_of(tokenizer, "some text")
    assert isinstance(language_of(tokenizer), Synthetic)
    assert isinstance(language_of(Letters()), English)
