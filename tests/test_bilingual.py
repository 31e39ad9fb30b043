"""The bilingual tasks: right by computation, short, split alike in both languages; the teacher."""

import dataclasses
import re

import pytest

from grpo.data.bilingual import Backwards, CarelessSums, WordedSums
from grpo.data.few_shot import FewShot
from grpo.data.procedural import MaxOf
from grpo.data.sources import Mixture
from rewards.answers import numeric_answer
from rewards.api import Problem
from rewards.formats import r1_format
from rewards.language import LanguageShare, language_consistency
from rewards.sequences import letters_share

TASKS = {"WordedSums": (WordedSums(), numeric_answer), "Backwards": (Backwards(), letters_share)}
every_task = pytest.mark.parametrize("task, judge", TASKS.values(), ids=TASKS)
ASKED = re.compile(r"(add|求和|flip|倒写) (.*)=")


def asked(problem: Problem) -> tuple[str, str]:
    """The task in its language, and what is asked about."""
    match = ASKED.fullmatch(problem.prompt)
    assert match is not None
    return match[1], match[2]


def thought(problem: Problem) -> str:
    return re.sub("</?think>|<answer>.*", "", problem.meta["worked"])


@every_task
def test_what_is_worked_is_right_in_form_in_its_language_and_short(task, judge):
    seen = set()
    for i in range(300):
        problem = task[i]
        language, worked = problem.meta["language"], problem.meta["worked"]
        other = {"en": "zh", "zh": "en"}[language]
        assert judge(worked, problem) == r1_format(worked, problem) == 1
        assert language_consistency(worked, problem) == 1
        assert LanguageShare(language)(thought(problem), problem) == 1
        assert LanguageShare(other)(thought(problem), problem) == 0
        assert len(problem.prompt.encode()) <= 15 and len(worked.encode()) <= 72
        seen.add((language, asked(problem)[0]))
    assert seen in (
        {("en", "add"), ("zh", "求和")},
        {("en", "flip"), ("zh", "倒写")},
    )


def test_sums_are_sums():
    for i in range(200):
        problem = WordedSums()[i]
        numbers = [int(n) for n in asked(problem)[1].split()]
        assert 3 <= len(numbers) <= 4 and min(numbers) >= 1 and max(numbers) <= 6
        assert problem.reference == sum(numbers) and problem.gold == str(sum(numbers))


def test_backwards_is_backwards():
    for i in range(200):
        problem = Backwards()[i]
        assert problem.reference == problem.gold == asked(problem)[1][::-1]


def test_chains_read_as_documented():
    chains = {}
    for i in range(400):
        problem = WordedSums(high=4)[i]
        chains[problem.prompt] = thought(problem)
    both = [text for text in chains if text.startswith("add") and "求和" + text[3:] in chains]
    assert len(both) > 10
    for text in both:
        a, b, *rest = (int(n) for n in text[4:-1].split())
        totals = [a + b + sum(rest[:k]) for k in range(len(rest) + 1)]
        pairs = list(zip([b, *rest], totals, strict=True))
        assert chains[text] == str(a) + "".join(f" and {n} is {t}" for n, t in pairs)
        assert chains["求和" + text[3:]] == str(a) + "".join(f"加{n}得{t}" for n, t in pairs)
    spelt = {p.prompt: thought(p) for p in map(Backwards(alphabet="ab").__getitem__, range(200))}
    assert spelt["flip aab="] == "from the end b then a then a"
    assert spelt["倒写 aab="] == "从后b再a再a"


@every_task
def test_held_out_questions_are_trained_on_in_neither_language(task, judge):
    held_out = dataclasses.replace(task, held_out=True, seed=7)

    def contents(source):
        questions = [asked(source[i])[1] for i in range(400)]
        return {tuple(sorted(q.split() if " " in q else q)) for q in questions}

    assert contents(task).isdisjoint(contents(held_out)) and contents(held_out)


@every_task
def test_problems_are_functions_of_seed_and_index(task, judge):
    again = dataclasses.replace(task, size=5)
    assert [again[4], again[0]] == [task[4], task[0]]
    assert [dataclasses.replace(task, seed=1)[i].prompt for i in range(20)] != [
        task[i].prompt for i in range(20)
    ]


def test_a_single_language_may_be_asked_for():
    problems = [WordedSums(languages=("zh",))[i] for i in range(20)]
    assert {p.meta["language"] for p in problems} == {"zh"}


@pytest.mark.parametrize(
    "task, message",
    [
        (WordedSums(min_terms=1), "min_terms"),
        (WordedSums(languages=("en", "fr")), "languages are drawn from"),
        (Backwards(languages=()), "languages are drawn from"),
        (Backwards(min_letters=4, max_letters=3), "min_letters"),
        (Backwards(alphabet=""), "alphabet"),
    ],
)
def test_impossible_settings_are_named(task, message):
    with pytest.raises(ValueError, match=message):
        task[0]


# ---- The careless teacher ----------------------------------------------------------------------


def test_a_mixed_chain_has_a_share_of_each_language():
    both = "3 and 4 is 7加2得9"
    assert LanguageShare("en")(both, WordedSums()[0]) == 1 / 2
    assert LanguageShare("zh")(both, WordedSums()[0]) == 1 / 2


def test_each_fault_is_one_that_its_reward_sees_and_no_other():
    source = WordedSums()
    teacher = CarelessSums(source=source, slip_rate=0.4, mix_rate=0.3, loose_rate=0.2, seed=5)
    counts = {"slipped": 0, "mixed": 0, "loose": 0}
    for i in range(500):
        problem, true = teacher[i], source[i]
        assert dataclasses.replace(problem, meta=true.meta) == true
        worked, meta = problem.meta["worked"], problem.meta
        assert numeric_answer(worked, problem) == float(not meta["slipped"])
        assert r1_format(worked, problem) == float(not meta["loose"])
        share = LanguageShare(meta["language"])(worked, problem)
        assert (share < 1) == meta["mixed"] and share <= (2 / 3 if meta["mixed"] else 1)
        assert len(worked.encode()) <= 72
        if not (meta["slipped"] or meta["mixed"] or meta["loose"]):
            assert worked == true.meta["worked"]
        for name in counts:
            counts[name] += meta[name]
    # 500 draws of each share: standard deviations of 11, 10 and 9.
    assert all(
        abs(count - 500 * rate) < 40
        for count, rate in zip(counts.values(), (0.4, 0.3, 0.2), strict=True)
    )
    assert teacher[3] == teacher[3] and len(teacher) == len(source)


def test_a_slip_is_one_wrong_digit_carried_on():
    teacher = CarelessSums(source=WordedSums(), slip_rate=1.0, mix_rate=0.0, loose_rate=0.0)
    for i in range(200):
        problem = teacher[i]
        first, *rest = (int(n) for n in re.findall("[0-9]+", thought(problem)))
        before = [first, *rest[1::2]]
        wrong = [a + n != t for a, n, t in zip(before, rest[::2], rest[1::2], strict=False)]
        assert sum(wrong) == 1
        assert problem.meta["worked"].endswith(f"<answer>{rest[-1]}</answer>")


def test_every_pattern_of_languages_comes_up():
    teacher = CarelessSums(source=WordedSums(min_terms=4), mix_rate=1.0, slip_rate=0, loose_rate=0)
    patterns = set()
    for i in range(200):
        problem = teacher[i]
        steps = re.findall("and|加", thought(problem))
        own = {"en": "and", "zh": "加"}[problem.meta["language"]]
        patterns.add(tuple(step == own for step in steps))
    assert len(patterns) == 2**3 - 1 and (True,) * 3 not in patterns


def test_the_teacher_knows_worded_sums_only():
    with pytest.raises(ValueError, match="not one of WordedSums"):
        CarelessSums(source=MaxOf())[0]
    with pytest.raises(ValueError, match="mix_rate should be between 0 and 1, got 3"):
        CarelessSums(source=WordedSums(), mix_rate=3)[0]
    whole = Mixture(parts=((0.5, CarelessSums(source=WordedSums())), (0.5, Backwards())), size=20)
    assert {whole[i].meta["task"] for i in range(20)} == {"WordedSums", "Backwards"}


# ---- Asking by example -------------------------------------------------------------------------

EXAMPLES = (("add 1 2=", "3"), ("add 2 2=", "4"))


def test_examples_go_before_raw_text():
    problem = Problem("p", prompt="add 5 1=", reference=6, meta={"task": "t"})
    shown = FewShot(EXAMPLES)(problem)
    assert shown.prompt == "add 1 2=3\nadd 2 2=4\nadd 5 1="
    assert dataclasses.replace(shown, prompt=problem.prompt) == problem
    assert FewShot(EXAMPLES[:1], separator=";")(problem).prompt == "add 1 2=3;add 5 1="


def test_examples_are_turns_behind_the_system_message():
    system, user = {"role": "system", "content": ""}, {"role": "user", "content": "add 5 1="}
    turns = [
        {"role": role, "content": text}
        for example in EXAMPLES
        for role, text in zip(("user", "assistant"), example, strict=True)
    ]
    shown = FewShot(EXAMPLES)(Problem("p", messages=(system, user)))
    assert shown.messages == (system, *turns, user)
    assert FewShot(EXAMPLES)(Problem("p", messages=(user,))).messages == (*turns, user)
    with pytest.raises(ValueError, match="no examples"):
        FewShot(())
