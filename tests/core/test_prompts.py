"""What a prompt means: alternatives, templates, braces; the same in every setting and command that takes prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cases import product_of
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import SettingsError, suggest
from pack.trainer.core.prompts import PromptError, PromptWords, common_words, parse_prompts
from pack.trainer.settings.evaluate import CompareCommand, ScoreCommand
from pack.trainer.settings.merge import LearnedMergeCommand
from pack.trainer.settings.train import GenerateCommand, PriorsCommand, TrainCommand, TrainSettings

DOG = PromptWords(token=" sks ", class_noun="dog\n")
NOTHING = PromptWords()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" | \n|", []),
        ("a photo of {token} {class}", ["a photo of sks dog"]),
        ("{class}{token}{class}", ["dogsksdog"]),
        (" {token}  asleep | a {class}\nawake\r\n", ["sks  asleep", "a dog", "awake"]),
        ("a dog :} | no {", ["a dog :}", "no {"]),
        ('{"scene": "a dog"}', ['{"scene": "a dog"}']),
        ("a (red:1.2) dog, [blue]", ["a (red:1.2) dog, [blue]"]),
    ],
)
def test_what_a_text_means(text: str, expected: list[str]) -> None:
    assert parse_prompts(text, DOG) == expected


@pytest.mark.parametrize(
    "template",
    [
        *("{}", "{0}", "{Token}", "{CLASS}", "{tokens}", "{class_noun}", "{class-noun}", "{class noun}", "{ token }"),
        *("{{token}}", "{{class}}", "{{token}", "{caption}", "{subject}", "{best quality}", "{名詞}"),
    ],
)
def test_what_looks_like_a_template_and_is_none_is_refused(template: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_prompts(f"a photo of {template} on grass", DOG)
    assert template in caught.value.problem
    assert "{token}" in caught.value.remedy


@pytest.mark.parametrize("text", ["{token dog", "{ class", "a {class] x", "{token dog {class}"])
def test_an_open_brace_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="without a closing brace"):
        parse_prompts(text, DOG)


@pytest.mark.parametrize("text", ["a {red|blue} dog", "{a\nb}", "{token|class}"])
def test_alternatives_in_braces_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match="braces can't list alternatives") as caught:
        parse_prompts(text, DOG)
    example = caught.value.remedy.rpartition(": ")[2].rstrip(".")
    assert parse_prompts(example, DOG) == ["a red dog", "a blue dog"]  # the remedy works


@product_of(setting=["token", "class_noun"], value=[None, "", " \n"])
def test_a_template_that_stands_for_nothing_is_refused(setting: str, value: str | None) -> None:
    template = {"token": "{token}", "class_noun": "{class}"}[setting]
    words = PromptWords(**{"token": "sks", "class_noun": "dog", setting: value})
    with pytest.raises(PromptError) as caught:
        parse_prompts(f"a {template}", words)
    assert template in caught.value.problem
    assert (suggest(setting) in caught.value.problem) == (value is not None)
    assert parse_prompts("a thing", words) == ["a thing"]


@given(st.text(st.characters(exclude_characters="|\n{}"), max_size=20), st.text("{}tokenclass|x ", max_size=15))
def test_words_are_put_in_as_they_are(token: str, text: str) -> None:
    """Whatever the rare word is, it is no template; and a text without braces is its own prompts."""
    if token.strip():
        assert parse_prompts("a {token} b", PromptWords(token, "{token}")) == [f"a {token.strip()} b"]
    try:
        prompts = parse_prompts(text, DOG)
    except PromptError:
        assert "{" in text
    else:
        assert len(prompts) == len([part for part in text.split("|") if part.strip()])


def test_the_words_of_several_subjects_are_what_they_have_in_common() -> None:
    dog, cat, other_dog = PromptWords("sks", "dog"), PromptWords("rraj", "cat"), PromptWords("rraj", "dog")
    assert common_words([dog]) == dog
    assert common_words([dog, other_dog]) == PromptWords(None, "dog")
    assert common_words([other_dog, cat]) == PromptWords("rraj", None)
    assert common_words([]) == NOTHING


TRAINING: dict[str, Any] = {"base": "b.safetensors", "images": "x"}
Make = Callable[[str], Any]
# Setting → a command with a prompt in it; the words that its templates stand for are sks and dog
WITH_WORDS: dict[str, Make] = {
    "instance_prompt": lambda text: TrainCommand.checked(TRAINING | {"instance_prompt": text, "class_noun": "dog"}),
    "class_prompt": lambda text: TrainCommand.checked(TRAINING | {"class_prompt": text, "class_noun": "dog"}),
    "preview_prompts": lambda text: TrainCommand.checked(
        TRAINING | {"preview_prompts": text, "preview_every": 1, "class_noun": "dog"}
    ),
    "a table's instance_prompt": lambda text: TrainCommand.checked(
        {"base": "b", "subject": [{"images": "x", "instance_prompt": text, "class_noun": "dog"}]}
    ),
    "a table's class_prompt": lambda text: TrainCommand.checked(
        {"base": "b", "subject": [{"images": "x", "class_prompt": text, "class_noun": "dog"}]}
    ),
}
# Where there is no class noun, or neither that nor a rare word
WITHOUT_WORDS: dict[str, Make] = {
    "priors": lambda text: PriorsCommand.checked({"base": "b", "class_prompt": text, "prior_count": 1}),
    "prompt": lambda text: GenerateCommand.checked({"base": "b", "prompt": text}),
    "negative_prompt": lambda text: GenerateCommand.checked({"base": "b", "prompt": "x", "negative_prompt": text}),
    "subject_prompt": lambda text: LearnedMergeCommand.checked(
        {"base": "b", "loras": ["a", "b"], "output": "c", "subject_prompt": text, "style_prompt": "x"}
    ),
    "style_prompt": lambda text: LearnedMergeCommand.checked(
        {"base": "b", "loras": ["a", "b"], "output": "c", "subject_prompt": "x", "style_prompt": text}
    ),
    "score": lambda text: ScoreCommand.checked({"pictures": "x", "clip": "c", "prompt": text}),
    "compare": lambda text: CompareCommand.checked(
        {"base": "b", "runs": ["r"], "clip": "c", "subject": "x", "prompts": text}
    ),
}


@product_of(make=WITH_WORDS | WITHOUT_WORDS, template=["{noun}", "{Class}", "{red|blue}", "{{class}}", "{token"])
def test_every_prompt_refuses_what_is_not_known(make: Make, template: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make(f"a photo of {template}")
    assert "{" in caught.value.problem
    assert caught.value.remedy.strip()


@pytest.mark.parametrize("make", WITHOUT_WORDS.values(), ids=WITHOUT_WORDS)
def test_where_there_is_no_class_noun_its_template_is_refused(make: Make) -> None:
    with pytest.raises(SettingsError, match=r"\{class\}, which has no value here") as caught:
        make("a {class}")
    assert caught.value.remedy == "Write out the words themselves."
    make("a dog")


@pytest.mark.parametrize("name", ["instance_prompt", "class_prompt", "preview_prompts"])
def test_a_missing_class_noun_is_named_with_a_remedy(name: str) -> None:
    values = TRAINING | {name: "a {token} {class}", "preview_every": 1}
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked(values)
    assert name in caught.value.problem
    assert "class_noun is empty" in caught.value.problem
    assert caught.value.remedy_in(lambda setting, value: f"[{setting}={value}]").startswith("Set [class_noun=dog]")
    TrainCommand.checked(values | {"class_noun": "dog"})  # the remedy works


def test_prompts_of_a_run_are_filled() -> None:
    values = {"class_noun": "cat", "token": "rraj", "preview_every": 1}
    values |= {"instance_prompt": "a {token} {class} | {token}", "class_prompt": "a {class}|the {class}"}
    settings = TrainCommand.checked(TRAINING | values | {"preview_prompts": "{token} {class} in the snow\n{token}"})
    [subject] = settings.subjects
    assert subject.instance_prompt == "a rraj cat | rraj"
    assert subject.class_prompt == "a cat | the cat"
    assert settings.with_filled_previews().preview_prompts == "rraj cat in the snow | rraj"


def test_a_class_prompt_among_the_instance_prompts_is_refused() -> None:
    values = {"instance_prompt": "a sks dog | a dog", "class_prompt": "a puppy | a dog", "prior_count": 2}
    with pytest.raises(SettingsError, match="class_prompt equals instance_prompt"):
        TrainCommand.checked(TRAINING | values)


def test_previews_of_several_subjects_know_what_these_have_in_common() -> None:
    tables = [{"images": "x", "token": token, "class_noun": "dog"} for token in ("sks", "rraj")]
    values = {"base": "b", "subject": tables, "preview_every": 1}
    settings = TrainCommand.checked(values | {"preview_prompts": "sks {class}"})
    assert settings.with_filled_previews().preview_prompts == "sks dog"
    with pytest.raises(SettingsError, match=r"\{token\}, which has no value here"):
        TrainCommand.checked(values | {"preview_prompts": "{token} {class}"})


def test_a_node_knows_of_a_template_that_is_unknown_before_it_knows_the_words() -> None:
    with pytest.raises(SettingsError, match=r"\{noun\}"):
        TrainSettings.checked({"preview_every": 1, "preview_prompts": "a {noun}"})
    assert TrainSettings.checked({"preview_every": 1, "preview_prompts": "a {class}"}).preview_prompts == "a {class}"


def test_one_prompt_where_there_is_one() -> None:
    with pytest.raises(SettingsError, match="separate its parts with commas"):
        GenerateCommand.checked({"base": "b", "prompt": "x", "negative_prompt": "blurry | dark"})
    with pytest.raises(SettingsError, match="a text file next to it"):
        ScoreCommand.checked({"pictures": "x", "clip": "c", "prompt": "a dog | a cat"})
    assert GenerateCommand.checked({"base": "b", "prompt": "x | y"}).prompts == ["x", "y"]


def test_the_rare_word_of_a_comparison_is_put_in() -> None:
    values = {"base": "b", "runs": ["r"], "clip": "c", "subject": "x", "token": "rraj"}
    assert CompareCommand.checked(values | {"prompts": "{token} cat\nx rraj | y"}).prompt_list == [
        "rraj cat",
        "x rraj",
        "y",
    ]
