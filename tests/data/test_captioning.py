"""Captions: equal to what transformers' own processor and model say, words put in, files written, bad input named."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from comfy_graphs import node
from comfy_host import ComfyServer, PromptFailed
from helpers import DEMO, Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.__main__ import main
from pack.trainer.core.errors import CancelledError, PicturesError, SettingsError, StorageError, WeightsError
from pack.trainer.data import captioning
from pack.trainer.data.captioning import BATCH, Captioner, apply_template, caption_folder, open_captioner
from pack.trainer.data.images import load_pictures
from pack.trainer.data.tree import MAX_FILE_BYTES
from pack.trainer.settings.caption import CaptionCommand, CaptionSettings
from picture_trees import THREE, captions, load, photos, put
from PIL import Image
from small_captioner import tiny_blip

CPU = torch.device("cpu")
SIZES = [(64, 64), (37, 91), (200, 50), (33, 32), (60, 80)]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("models ü") / "tiny blip")


@pytest.fixture(scope="module")
def captioner(blip: Path) -> Captioner:
    return open_captioner(str(blip), CPU)


def images(count: int) -> list[Image.Image]:
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(SIZES[seed % 5])
        for seed in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one of them captioned, and something that is none."""
    place = tmp_path / "my pictures ü"
    place.mkdir()
    for number, image in enumerate(images(4)):
        image.save(place / f"{number}.png")
    images(5)[4].save(place / "söfa.JPG")
    (place / "2.txt").write_text("my own words", encoding="utf-8")
    (place / "notes.md").write_text("none")
    return place


def command(folder: Path, blip: Path, **more: Any) -> CaptionCommand:
    return CaptionCommand.checked({"images": folder, "model": str(blip), "device": "cpu", "max_tokens": 8, **more})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("text", ["", "a photo of", "  the   red "])
def test_captions_are_transformers_own(text: str, beams: int, captioner: Captioner, blip: Path) -> None:
    """Its processor, one picture at a time, its model, its decoding; here in batches, from `describe`."""
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = transformers.BlipProcessor(captioner.processor, captioner.tokenizer)
    pictures = images(BATCH + 3)
    expected = []
    for picture in pictures:
        words = {"text": " ".join(text.split())} if text else {}
        inputs = processor(picture, **words, return_tensors="pt")
        found = model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=9)
        expected.append(processor.decode(found[0], skip_special_tokens=True))
    assert captioner.describe(pictures, text, beams=beams, max_tokens=9) == expected
    assert len(set(expected)) > 4
    assert all(one.startswith(" ".join(text.split())) for one in expected)


def test_captions_end_in_time(captioner: Captioner) -> None:
    pictures = images(6)
    for longest in (1, 5):
        lengths = [len(one.split()) for one in captioner.describe(pictures, beams=1, max_tokens=longest)]
        assert max(lengths) == longest
    assert max(len(one.split()) for one in captioner.describe(pictures, beams=1, max_tokens=200)) <= 47
    with pytest.raises(SettingsError, match="too long for tiny blip"):
        captioner.describe(pictures[:1], "a dog " * 30, beams=1, max_tokens=5)


def words(**more: Any) -> CaptionSettings:
    return CaptionSettings.checked({"token": "sks", "class_noun": "dog", **more})


@pytest.mark.parametrize(
    ("caption", "more", "expected"),
    [
        ("a dog sitting on a sofa", {}, "a sks dog sitting on a sofa"),
        ("a brown dog and a dog", {}, "a brown sks dog and a dog"),
        ("the Dog", {}, "the sks Dog"),
        ("dog", {}, "sks dog"),
        ("two dogs and a hotdog", {}, "sks dog, two dogs and a hotdog"),
        ("", {}, "sks dog"),
        ("a photo of sks dog on grass", {}, "a photo of sks dog on grass"),
        ("an apple on a tree", {"class_noun": "apple"}, "a sks apple on a tree"),
        ("a cat", {"class_noun": "cat", "token": "ohwx"}, "an ohwx cat"),
        ("a robot toy on a table", {"class_noun": "robot toy"}, "a sks robot toy on a table"),
        ("a c++ (red) book", {"class_noun": "c++ (red)"}, "a sks c++ (red) book"),
        ("a dog", {"token": ""}, "a dog"),
        ("a house", {"class_noun": ""}, "sks, a house"),
        ("a house", {"token": "", "class_noun": ""}, "a house"),
        ("a dog here", {"template": "a photo of {token} {class}, {caption}"}, "a photo of sks dog, a dog here"),
        ("a dog here", {"template": "{caption}, in  pixel art"}, "a sks dog here, in pixel art"),
        ("a cat here", {"template": "in pixel art: {caption}"}, "in pixel art: sks dog, a cat here"),
        ("a dog", {"template": "{caption}, {class}"}, "a sks dog, dog"),
        ("a {token} dog", {"template": "{token}: {caption}"}, "sks: a token dog"),
        (r"a dog \1", {"token": r"s\1s"}, r"a s\1s dog \1"),
    ],
)
def test_words_are_put_in(caption: str, more: dict[str, Any], expected: str) -> None:
    assert apply_template(caption, words(**more)) == expected


@given(st.lists(st.sampled_from(["a", "an", "dog", "dogs", "sks", "red", "on"]), max_size=8), st.booleans())
def test_the_rare_word_is_in_every_caption_once_more_at_most(parts: list[str], is_prefix: bool) -> None:
    caption = " ".join(parts)
    made = apply_template(caption, words(template="{token} {class}, {caption}" if is_prefix else "{caption}")).split()
    assert "sks" in [word.strip(",") for word in made]
    if not is_prefix:
        assert made.count("sks") == max(1, parts.count("sks"))
        assert apply_template(" ".join(made), words()) == " ".join(made)
    assert [word for word in parts if word not in ("a", "an", "sks")] == [
        word for word in made[2 * (is_prefix or _is_prefixed(parts)) :] if word not in ("a", "an", "sks")
    ]


def _is_prefixed(parts: list[str]) -> bool:
    return "dog" not in parts and "sks" not in parts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "a photo"}, r"must contain \{caption\}"),
        ({"template": "{caption} {noun}"}, r"unknown placeholder \{noun\}"),
        ({"template": "{caption} {}"}, r"unknown placeholder \{\}"),
        ({"template": "{token} {caption}", "token": " "}, "token is not set"),
        ({"template": "{class} {caption}", "class_noun": ""}, "class_noun is not set"),
        ({"beams": 0}, "beams"),
    ],
)
def test_settings_that_contradict_each_other_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        words(**values)


def test_a_file_is_written_beside_each_picture_and_none_is_overwritten(folder: Path, blip: Path) -> None:
    recorder = Recorder()
    captions = caption_folder(command(folder, blip, token="sks", class_noun="dog"), recorder)
    assert list(captions) == ["0.png", "1.png", "3.png", "söfa.JPG"]
    assert sorted(path.name for path in folder.glob("*.txt")) == ["0.txt", "1.txt", "2.txt", "3.txt", "söfa.txt"]
    assert (folder / "2.txt").read_text(encoding="utf-8") == "my own words"
    assert recorder.notes == ["1 of 5 pictures already have captions, which are kept."]
    shown = [Image.open(folder / name) for name in captions]
    direct = open_captioner(str(blip), CPU).describe(shown, beams=3, max_tokens=8)
    expected = [apply_template(one, words()) for one in direct]
    assert len(set(expected)) > 2
    assert list(captions.values()) == expected
    read = load_pictures(folder, "a prompt", Recorder())
    assert {one.name: one.caption for one in read} == captions | {"2.png": "my own words"}


@pytest.fixture
def own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captioner whose words for every picture are the same, with what means something else in a prompt."""

    class Words:
        def describe(self, pictures: Sequence[Image.Image], text: str, **options: Any) -> list[str]:
            return ["a {blurry} | thing"] * len(pictures)

    monkeypatch.setattr(captioning, "open_captioner", lambda *arguments, **options: Words())


WRITTEN = ("a blurry thing",)
HAVE_CAPTIONS: dict[str, tuple[dict[str, bytes], dict[str, tuple[str, ...]]]] = {
    "text files": ({"a.txt": b"by hand"}, {"a.png": ("by hand",)}),
    "capitals": ({"A.TXT": b"by hand"}, {"a.png": ("by hand",)}),
    "the other ending": ({"a.caption": b"by hand"}, {"a.png": ("by hand",)}),
    "metadata.jsonl": ({"metadata.jsonl": b'{"file_name": "b.png", "text": "by hand"}'}, {"b.png": ("by hand",)}),
    "metadata.csv": ({"metadata.csv": b"file_name,text\nb.png,one | two"}, {"b.png": ("one", "two")}),
    "UTF-16": ({"c.txt": "by hand".encode("utf-16")}, {"c.png": ("by hand",)}),
    "an empty file": ({"a.txt": b" ", "b.txt": b"by hand"}, {"b.png": ("by hand",)}),
    "an empty file before another": ({"a.txt": b"", "a.caption": b"by hand"}, {"a.png": ("by hand",)}),
    "templates": ({"a.txt": b"{token} by hand"}, {"a.png": ("sks by hand",)}),
}


@pytest.mark.usefixtures("own_words")
@pytest.mark.parametrize("where", ["", "10_sks dog/", "img/10_sks dog/"])
@pytest.mark.parametrize("kind", HAVE_CAPTIONS)
def test_what_has_a_caption_keeps_it(kind: str, where: str, tmp_path: Path) -> None:
    """What counts as a caption for a run counts for whoever writes captions; the name of a folder does not."""
    beside, kept = HAVE_CAPTIONS[kind]
    folder = put(tmp_path / "tree", {f"{where}{name}": content for name, content in (THREE | beside).items()})
    recorder = Recorder()
    written = caption_folder(CaptionCommand.checked({"images": folder, "model": "any", "device": "cpu"}), recorder)
    assert written == {f"{where}{name}": WRITTEN[0] for name in sorted(THREE) if name not in kept}
    assert recorder.notes == [f"{len(kept)} of 3 pictures already have captions, which are kept."]
    pictures, _ = load(folder, token="sks")
    assert captions(pictures) == {f"{where}{name}": kept.get(name, WRITTEN) for name in sorted(THREE)}


@pytest.mark.usefixtures("own_words")
def test_a_caption_that_cannot_be_read_now_is_not_replaced(tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", THREE)
    with open(folder / "a.txt", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    recorder = Recorder()
    written = caption_folder(CaptionCommand.checked({"images": folder, "model": "any", "device": "cpu"}), recorder)
    assert list(written) == ["b.png", "c.png"]
    assert recorder.notes == ["1 of 3 pictures already have captions, which are kept."]
    assert (folder / "a.txt").stat().st_size == MAX_FILE_BYTES + 1


@pytest.mark.usefixtures("own_words")
@pytest.mark.parametrize("kind", HAVE_CAPTIONS)
def test_with_overwrite_every_picture_gets_the_new_caption(kind: str, tmp_path: Path) -> None:
    beside, _ = HAVE_CAPTIONS[kind]
    folder = put(tmp_path / "tree", THREE | beside)
    values = {"images": folder, "model": "any", "device": "cpu", "overwrite": True}
    caption_folder(CaptionCommand.checked(values), Recorder())
    assert captions(load(folder)[0]) == dict.fromkeys(sorted(THREE), WRITTEN)


@pytest.mark.usefixtures("own_words")
def test_pictures_of_one_name_in_several_folders_have_a_caption_each(tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", photos("10_sks dog/1.png", "2_sks cat/1.png", "2_sks cat/2.png"))
    values = {"images": folder, "model": "any", "device": "cpu", "token": "sks"}
    written = caption_folder(CaptionCommand.checked(values), Recorder())
    assert list(written) == ["10_sks dog/1.png", "2_sks cat/1.png", "2_sks cat/2.png"]
    texts = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    assert texts == ["10_sks dog/1.txt", "2_sks cat/1.txt", "2_sks cat/2.txt"]


@pytest.mark.usefixtures("own_words")
@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_that_are_not_utf8_get_captions(tmp_path: Path) -> None:
    source = put(tmp_path / "tree", THREE)
    os.rename(os.fsencode(source / "a.png"), os.path.join(os.fsencode(source), b"caf\xe9.png"))
    caption_folder(CaptionCommand.checked({"images": source, "model": "any", "device": "cpu"}), Recorder())
    assert captions(load(source)[0])["caf\\xe9.png"] == WRITTEN
    assert b"caf\xe9.txt" in os.listdir(os.fsencode(source))


def test_a_second_call_does_not_even_open_the_model(folder: Path, blip: Path) -> None:
    caption_folder(command(folder, blip), Recorder())
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    recorder = Recorder()
    assert caption_folder(command(folder, blip.parent / "nowhere"), recorder) == {}
    assert recorder.notes == ["5 of 5 pictures already have captions, which are kept."]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")} == written
    assert len(caption_folder(command(folder, blip, overwrite=True), Recorder())) == 5
    assert (folder / "2.txt").read_text(encoding="utf-8") != "my own words"


def test_the_command_prints_a_line_per_picture(folder: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(blip), "--token", "ßks", "--class-noun", "tree house", "--device", "cpu"]
    flags += ["--template", "{token} {class}, {caption}", "--max-tokens", "4"]
    assert main(["caption", str(folder), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, caption = line.split(": ", 1)
        assert caption.startswith("ßks tree house, ")
        assert (folder / name).with_suffix(".txt").read_bytes() == f"{caption}\n".encode()


def test_pictures_that_cannot_be_read_are_left_out(folder: Path, blip: Path) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(folder / "tiny.png")
    images(1)[0].save(folder / "0.webp")
    recorder = Recorder()
    captions = caption_folder(command(folder, blip), recorder)
    assert list(captions) == ["0.png", "3.png", "söfa.JPG"]
    assert not (folder / "1.txt").exists()
    problems = "\n".join(recorder.warnings)
    for problem in ("0.webp is skipped: its caption would overwrite", "1.png is skipped", "tiny.png is skipped"):
        assert problem in problems


def test_a_picture_without_words_gets_no_file_unless_the_subject_has_some(folder: Path, tmp_path: Path) -> None:
    silent = tiny_blip(tmp_path / "silent", end=1000.0)
    recorder = Recorder()
    assert caption_folder(command(folder, silent), recorder) == {}
    assert not (folder / "0.txt").exists()
    assert recorder.warnings[0] == "0.png gets no caption: the model generated none."
    found = caption_folder(command(folder, silent, token="sks", template="a {token}, {caption}"), Recorder())
    assert set(found.values()) == {"a sks"}


def test_it_can_be_stopped_between_batches(tmp_path: Path, blip: Path) -> None:
    for number, image in enumerate(images(BATCH + 2)):
        image.save(tmp_path / f"{number:02d}.png")
    with pytest.raises(CancelledError):
        caption_folder(command(tmp_path, blip, token="sks"), Recorder(stop_after=2))
    assert len(list(tmp_path.glob("*.txt"))) == BATCH
    assert list(caption_folder(command(tmp_path, blip, token="sks"), Recorder())) == ["08.png", "09.png"]


def test_bad_folders_are_named_before_the_model_is_opened(tmp_path: Path, folder: Path) -> None:
    nowhere = tmp_path / "no model"
    shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "zipped.zip", "if this is a zip file, unpack it"),
        (tmp_path / "empty", "contains no pictures"),
    ):
        with pytest.raises(PicturesError, match=message):
            caption_folder(command(place, nowhere), Recorder())
    with pytest.raises(WeightsError, match="no model"):
        caption_folder(command(folder, nowhere), Recorder())


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_opened(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="can't be written"):
            caption_folder(command(folder, tmp_path / "no model"), Recorder())
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["nobody/here", "/no/such/folder", "file.safetensors", "a  b"])
def test_a_model_that_is_not_there_is_named_and_not_fetched(name: str) -> None:
    with pytest.raises(WeightsError) as failure:
        open_captioner(name, CPU)
    assert name in failure.value.problem
    assert "preprocessor_config.json" in failure.value.remedy
    assert "download" in failure.value.remedy


def test_another_model_is_refused_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a clip model") as failure:
        open_captioner(str(DEMO / "scorer"), CPU)
    assert "blip" in failure.value.remedy
    with pytest.raises(WeightsError, match="can't generate captions"):
        open_captioner(str(tiny_blip(tmp_path / "retrieval", "BlipForImageTextRetrieval")), CPU)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_file_is_named(lost: str, blip: Path, tmp_path: Path) -> None:
    place = shutil.copytree(blip, tmp_path / "part")
    (place / lost).unlink()
    with pytest.raises(WeightsError) as failure:
        open_captioner(str(place), CPU)
    assert "part" in failure.value.problem
    assert lost in failure.value.remedy


@pytest.fixture(scope="module")
def captioned(comfy: ComfyServer) -> None:
    """The tiny BLIP where people put it, and two pictures."""
    tiny_blip(comfy.base_dir / "models" / "BLIP" / "tiny")
    for number, image in enumerate(images(2)):
        image.resize((64, 64)).save(comfy.base_dir / "input" / f"caption-{number}.png")


def caption_node(**more: Any) -> dict[str, dict[str, Any]]:
    values = {"model": "someone/tiny", "token": "sks", "class_noun": "dog", "text": "", "template": "{caption}"}
    values |= {"beams": 3, "download": False, **more}
    both = node("ImageBatch", image1=["one", 0], image2=["two", 0])
    loads = {name: node("LoadImage", image=f"caption-{number}.png") for number, name in enumerate(("one", "two"))}
    return loads | {"both": both, "caption": node("DreamBoothCaptionImages", images=["both", 0], **values)}


@pytest.mark.comfy
@pytest.mark.usefixtures("captioned")
def test_the_node_says_what_the_engine_says(server: ComfyServer) -> None:
    prompt = caption_node() | {"shown": node("PreviewAny", source=["caption", 0])}
    outputs = server.wait(server.queue(prompt))["outputs"]
    captioner = open_captioner(str(server.base_dir / "models" / "BLIP" / "tiny"), CPU)
    pictures = [Image.open(server.base_dir / "input" / f"caption-{number}.png") for number in range(2)]
    expected = [apply_template(one, words()) for one in captioner.describe(pictures, beams=3, max_tokens=40)]
    assert outputs["caption"]["text"] == ["\n".join(expected)]
    assert outputs["shown"]["text"] == outputs["caption"]["text"]


@pytest.mark.comfy
@pytest.mark.usefixtures("captioned")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "nobody/here"}, "models/BLIP"), ({"template": "x"}, "must contain {caption}")],
    ids=["model", "template"],
)
def test_the_node_names_bad_input(changes: dict[str, Any], message: str, server: ComfyServer) -> None:
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(caption_node(**changes)))
    assert message in failure.value.exception_message
