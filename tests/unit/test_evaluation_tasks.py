"""Tasks are what their definitions say, fit the context, and are the same every time."""

import collections
import random
import re

import pytest

from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import text
from twilight_sgl.evaluation.tasks import GROUPS, TASKS, make_sample, parse_tasks

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


def count_tokens(prompt: str) -> int:
    """Words of up to four letters, and every other character but spaces."""
    return 1 + len(re.findall(r"\w{1,4}|[^\w\s]", prompt))


def sample(task: str, context: int = 4096, index: int = 0, seed: int = 0):
    return make_sample(task, context, seed, index, count_tokens)


def body(prompt: str) -> str:
    """The prompt without its question and the start of the answer."""
    return prompt.rpartition("\n\n")[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context", [4096, 5000, 28 << 10])
def test_prompts_fill_the_context_and_leave_room_for_the_output(task: str, context: int) -> None:
    made = sample(task, context)
    limit = context - TASKS[task].output_tokens
    assert made.prompt_tokens == count_tokens(made.prompt)
    assert limit - 150 < made.prompt_tokens <= limit
    assert made.output_tokens == TASKS[task].output_tokens


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_the_same_every_time_and_differ_by_key(task: str) -> None:
    assert sample(task) == sample(task)
    others = [sample(task, index=1), sample(task, seed=1), sample(task, context=4200)]
    assert len({made.prompt for made in [sample(task), *others]}) == 4
    assert len({tuple(made.references) for made in [sample(task), *others]}) == 4


@pytest.mark.parametrize("task", [name for name in TASKS if name != "cwe"])
def test_the_text_holds_every_reference_and_the_end_none(task: str) -> None:
    made = sample(task)
    assert len(set(made.references)) == len(made.references)
    for reference in made.references:
        assert reference in body(made.prompt)
        assert reference not in made.prompt.rpartition("\n\n")[2]


@pytest.mark.parametrize(
    ("task", "keys", "references", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, UUID),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 1, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_are_as_many_as_published(
    task: str, keys: int, references: int, value: str
) -> None:
    made = sample(task)
    needles = re.findall(rf"The secret \w+ of (\S+) is ({value})\.", body(made.prompt))
    assert len({key for key, _ in needles}) == keys
    assert len(needles) == max(keys, references)
    asked = [key for key, _ in needles if key in made.prompt.rpartition("\n\n")[2]]
    assert sorted(v for k, v in needles if k in asked) == sorted(made.references)


@pytest.mark.parametrize(
    ("task", "key"), [("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", UUID)]
)
def test_haystacks_of_needles_hold_each_key_and_value_once(task: str, key: str) -> None:
    made = sample(task)
    needles = re.findall(rf"The secret \w+ of ({key}) is (\S+)\.", body(made.prompt))
    assert len(needles) > 50
    assert len(dict(needles)) == len({value for _, value in needles}) == len(needles)
    (asked,) = set(re.findall(key, made.prompt.rpartition("\n\n")[2]))
    assert [dict(needles)[asked]] == made.references


def test_needles_lie_at_every_depth() -> None:
    depths = []
    for index in range(40):
        made = sample("niah_single_2", index=index)
        depths.append(made.prompt.index(made.references[0]) / len(made.prompt))
    assert {int(depth * 4) for depth in depths} == {0, 1, 2, 3}


def test_conversations_share_a_text_and_each_asks_for_another_early_fact() -> None:
    made = [sample("multi_turn", index=index) for index in range(8)]
    texts = [one.prompt.split("\n\nQuestion: ")[0] for one in made]
    assert len(set(texts[:4])) == len(set(texts[4:])) == 1
    assert texts[0] != texts[4]
    asked = set()
    for one, shared in zip(made[:4], texts, strict=False):
        _, before, question = one.prompt.split("\n\nQuestion: ")
        (key,) = set(re.findall(r"secret number of (\S+)", question))
        asked.add(key)
        assert one.references == re.findall(rf"secret number of {key} is (\d{{7}})\.", shared)
        assert shared.index(one.references[0]) < 0.3 * len(shared)
        assert one.references[0] not in before
        assert re.search(r"given in the text is (\d{7})\.$", before)[1] in shared
    assert len(asked) == 4


def test_variables_follow_one_chain_of_four_hops() -> None:
    made = sample("vt")
    question = made.prompt.split("\n\nVariables are assigned")[1]
    value = re.search(r"Which variables have the value (\d{5})\?", question)
    assert value is not None
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})\.", question)
    assert [name for name, _ in chain] == made.references
    assert [source for _, source in chain] == [value[1], *made.references[:-1]]


def test_common_words_occur_thirty_times_and_others_three() -> None:
    made = sample("cwe")
    listed = made.prompt.split("\n\n")[-2]
    counts = collections.Counter(re.findall(r"\d+\. (\S+)", listed))
    assert sorted(word for word, count in counts.items() if count == 30) == sorted(made.references)
    assert len(made.references) == 10
    assert set(counts.values()) == {3, 30}
    example = collections.Counter(re.findall(r"\d+\. (\S+)", made.prompt.split("\n\n")[1]))
    assert not set(example) & set(counts)


def test_frequent_words_follow_zipf_and_dots_do_not_count() -> None:
    made = sample("fwe")
    counts = collections.Counter(body(made.prompt).split("\n\n")[1].split())
    ranked = counts.most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == made.references
    assert ranked[1][1] == pytest.approx(ranked[0][1] / 4, abs=1)
    assert ranked[3][1] > ranked[4][1]


def test_a_context_too_small_or_out_of_words_says_so() -> None:
    with pytest.raises(TwilightError, match=r"--context 256 is too small for cwe.*leave the task"):
        sample("cwe", 256)
    with pytest.raises(TwilightError, match=r"more than niah_multikey_2 has different words for"):
        sample("niah_multikey_2", 1 << 20)


def test_unknown_tasks_are_listed_with_what_there_is() -> None:
    assert parse_tasks(["ruler", "vt", "passkey"]) == [*GROUPS["ruler"], "passkey"]
    with pytest.raises(
        TwilightError, match=r"no task 'nope'; tasks: passkey, .*groups: all, ruler"
    ):
        parse_tasks(["vt", "nope"])


def test_draws_do_not_depend_on_how_many_are_asked_for() -> None:
    once, twice = text.names(random.Random(1)), text.names(random.Random(1))
    twice.first(3)
    assert once.first(50) == twice.first(50)
    assert len(set(once.first(10**6))) == len(text.ADJECTIVES) * len(text.NOUNS)


def test_essays_are_prose_from_places_of_their_own() -> None:
    one, two = (text.essay(random.Random(seed)).first(1000) for seed in range(2))
    assert one != two
    assert all(40 <= len(sentence) <= 300 for sentence in one)
    assert not any("---" in sentence or "::=" in sentence for sentence in one)
    assert sum(map(str.isalpha, "".join(one))) > 0.7 * len("".join(one))
