"""A folder of pictures means what a zip file of it means, at whatever level it is given; what is left out is told."""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import product_of
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import PicturesError, suggest
from pack.trainer.data.folder import picture_names
from pack.trainer.data.tree import find_path, opened_tree, shown_name
from pack.trainer.settings.data import SubjectTable
from picture_trees import PROMPT, THREE, captions, load, photo, photos, put, put_as, zipped

KINDS = ["folder", "zip"]
BOTH = pytest.mark.parametrize("kind", KINDS)
OWN = (PROMPT,)
APPLE_DOUBLE = b"\0\5\x16\7" + bytes(100)
BYTES_IN_NAMES = sys.platform == "linux"


def names(source: Path, **options: Any) -> list[str]:
    return [picture.name for picture in load(source, **options)[0]]


# ---- levels
LEVELS: dict[str, tuple[dict[str, bytes], list[str], list[str]]] = {  # files, pictures that are read, what is told
    "flat": (THREE, ["a.png", "b.png", "c.png"], []),
    "one folder": (
        {f"rex/{name}": content for name, content in THREE.items()},
        ["rex/a.png", "rex/b.png", "rex/c.png"],
        [],
    ),
    "one deep folder": (photos("x/y/a.png", "x/notes.md"), ["x/y/a.png"], ["Only 1 picture"]),
    "pictures and a folder": (
        THREE | photos("more/1.png", "more/2.png", "more/3.png", "more/4.png"),
        ["a.png", "b.png", "c.png"],
        ["The pictures in more (4) are ignored; only those in tree itself are used."],
    ),
    "few pictures and a folder": (
        photos("cover.png", "more/1.png", "more/2.png"),
        ["cover.png", "more/1.png", "more/2.png"],
        ["The pictures in tree itself and more are all used as pictures of one subject."],
    ),
    "folders": (
        photos("x/1.png", "y/z/2.png", "y/3.png"),
        ["x/1.png", "y/3.png", "y/z/2.png"],
        ["The pictures in x, y and y/z are all used as pictures of one subject."],
    ),
    "pictures below one folder": (
        {f"rex/{name}": content for name, content in (THREE | photos("old/1.png")).items()},
        ["rex/a.png", "rex/b.png", "rex/c.png"],
        ["The pictures in rex/old (1) are ignored; only those in rex are used."],
    ),
    "kohya's folders": (
        photos("10_zwx cat/1.png", "2_zwx cat/2.png", "2_zwx cat/3.png"),
        ["10_zwx cat/1.png", "2_zwx cat/2.png", "2_zwx cat/3.png"],
        [],
    ),
    "kohya's folders and others": (
        photos("10_zwx cat/1.png", "10_zwx cat/2.png", "10_zwx cat/3.png", "sample/x.png", "cover.png"),
        ["10_zwx cat/1.png", "10_zwx cat/2.png", "10_zwx cat/3.png"],
        ["The pictures in tree itself (1) and sample (1) are ignored; only those in 10_zwx cat are used."],
    ),
    "kohya's project": (
        photos("img/10_zwx cat/1.png", "img/10_zwx cat/2.png", "img/10_zwx cat/3.png", "reg/1_cat/4.png")
        | {"log/x.txt": b"x", "model/y.json": b"{}"},
        ["img/10_zwx cat/1.png", "img/10_zwx cat/2.png", "img/10_zwx cat/3.png"],
        ["The pictures in reg/1_cat (1) are ignored; only those in img/10_zwx cat are used. For class pictures, use"],
    ),
    "masks": (
        {**THREE, "masks/a.png": photo(1), "more/masks/x.png": photo(2)},
        ["a.png", "b.png", "c.png"],
        ["The pictures in more/masks (1) are ignored; only those in tree itself are used."],
    ),
    "hidden and systems' files": (
        {
            **THREE,
            "._a.png": APPLE_DOUBLE,
            ".hidden.png": photo(7),
            ".trash/1.png": photo(8),
            "__MACOSX/._a.png": APPLE_DOUBLE,
            "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": photo(9),
            "Thumbs.db": b"x",
            "desktop.ini": b"x",
            ".DS_Store": b"x",
            "._a.txt": APPLE_DOUBLE,
        },
        ["a.png", "b.png", "c.png"],
        [],
    ),
    "hidden files above": (
        {**{f"10_zwx cat/{name}": content for name, content in THREE.items()}, "._old.jpg": APPLE_DOUBLE},
        ["10_zwx cat/a.png", "10_zwx cat/b.png", "10_zwx cat/c.png"],
        [],
    ),
}


@product_of(level=LEVELS, kind=KINDS)
def test_which_pictures_are_read(level: Any, kind: str, tmp_path: Path) -> None:
    files, expected, told = level
    source = put_as(kind, tmp_path / "tree", files)
    pictures, recorder = load(source)
    assert [picture.name for picture in pictures] == expected
    assert len(recorder.notes) == len(told)
    for note, text in zip(recorder.notes, told, strict=True):
        assert note.startswith(text)
    assert picture_names(source) == expected


@product_of(kind=KINDS, level=["itself", "its parent", "its grandparent"])
def test_kohyas_folders_mean_the_same_at_every_level(kind: str, level: str, tmp_path: Path) -> None:
    above = {"itself": "", "its parent": "10_zwx cat/", "its grandparent": "img/10_zwx cat/"}[level]
    place = tmp_path / ("10_zwx cat" if level == "itself" else "train")
    files = {f"{above}{name}": content for name, content in (THREE | {"b.txt": b"own"}).items()}
    pictures, recorder = load(put_as(kind, place, files), repeats=2)
    assert [picture.captions for picture in pictures] == [("zwx cat",), ("own",), ("zwx cat",)]
    assert [picture.repeats for picture in pictures] == [20, 20, 20]
    told = ["The name of 10_zwx cat means that its pictures are repeated 10 times, with the caption 'zwx cat'."]
    assert recorder.notes == (told if level == "itself" else [])
    without, recorder = load(put_as(kind, place, files), captions="prompt")
    assert [picture.captions for picture in without] == [OWN] * 3
    assert recorder.notes == (
        ["The name of 10_zwx cat means that its pictures are repeated 10 times."] if level == "itself" else []
    )


def test_kohyas_folder_is_known_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "10_zwx cat", THREE)
    monkeypatch.chdir(folder)
    for source in (Path("."), Path("../10_zwx cat"), Path(f"{folder}/")):
        assert [picture.captions for picture in load(source)[0]] == [("zwx cat",)] * 3


def test_class_pictures_of_kohyas_project_have_a_setting_of_their_own(tmp_path: Path) -> None:
    files, _, _ = LEVELS["kohya's project"]
    _, recorder = load(put(tmp_path / "tree", files))
    assert suggest("class_images") in recorder.notes[0]
    assert names(tmp_path / "tree" / "reg") == ["1_cat/4.png"]


PIECES = st.sampled_from(["a", "b", "é", "10_x y", "masks", "reg", "img", ".hidden", "__MACOSX", "Ü"])
ENDINGS = st.sampled_from([".png", ".PNG", ".txt", ".caption", "_mask.png", "-masklabel.png", ".md", ".heic"])


@given(
    tree=st.lists(st.tuples(st.lists(PIECES, min_size=1, max_size=3), ENDINGS), max_size=8, unique_by=str),
    reads_captions=st.booleans(),
)
def test_a_folder_and_its_zip_are_the_same(
    tree: list[tuple[list[str], str]], reads_captions: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pictures, captions, masks, repeats, notes and errors."""
    files = {"/".join(pieces) + ending: photo(index) for index, (pieces, ending) in enumerate(tree)}
    files = {name: b"sks | two" if name.endswith((".txt", ".caption")) else content for name, content in files.items()}
    files = {name: content for name, content in files.items() if not any(f"{name}/" in other for other in files)}
    place = tmp_path_factory.mktemp("trees") / "5_tree"
    seen = []
    for kind in KINDS:
        place.mkdir(exist_ok=True)
        source = put_as(kind, place, files)
        try:
            pictures, recorder = load(source, captions="files" if reads_captions else "prompt")
        except PicturesError as error:
            seen.append(
                (str(error).replace(str(source), "").replace("The zip file", "The folder"), picture_names(source))
            )
        else:
            found = [(picture.name, picture.fingerprint_values, picture.mask is None) for picture in pictures]
            seen.append((found, recorder.notes, picture_names(source)))
    assert seen[0] == seen[1]


def test_a_link_that_leads_back_is_walked_once(tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", {f"x/{name}": content for name, content in THREE.items()})
    for place in (folder / "x" / "back", folder / "again"):
        place.symlink_to(folder, target_is_directory=True)
    (folder / "x" / "gone.png").symlink_to(folder / "nowhere.png")
    pictures, recorder = load(folder)
    assert [picture.name for picture in pictures] == ["x/a.png", "x/b.png", "x/c.png"]
    assert recorder.warnings == ["x/gone.png is skipped: it does not exist."]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(put(tmp_path / "tree", THREE) / "d.png")
    pictures, recorder = load(tmp_path / "tree")
    assert len(pictures) == 3
    assert recorder.warnings == ["d.png is skipped: it is not a regular file."]


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "tree", THREE | photos("secret/1.png"))
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    pictures, recorder = load(folder)
    assert len(pictures) == 3
    assert recorder.warnings == ["The folder secret can't be read (Permission denied); it is skipped."]


# ---- side files
@BOTH
@pytest.mark.parametrize("picture", ["NFC", "NFD"])
@pytest.mark.parametrize("beside", ["NFC", "NFD"])
def test_side_files_are_found_however_umlauts_are_stored(picture: Any, beside: Any, kind: str, tmp_path: Path) -> None:
    name = unicodedata.normalize(picture, "Müsli im Glas")
    other = unicodedata.normalize(beside, "Müsli im Glas")
    files = {**THREE, f"{name}.png": photo(5), f"{other}.txt": b"sks in the bowl", f"{other}_mask.png": photo(6)}
    pictures, recorder = load(put_as(kind, tmp_path / "tree", files))
    found = next(one for one in pictures if one.name == f"{name}.png")
    assert found.captions == ("sks in the bowl",)
    assert found.mask is not None
    assert len(pictures) == 4
    assert not recorder.notes


@BOTH
@pytest.mark.parametrize(
    ("picture", "beside", "mask"),
    [
        ("A.JPG", "A.TXT", "A_MASK.PNG"),
        ("IMG.png", "img.txt", "Masks/img.PNG"),
        ("a.PNG", "A.Caption", "A-MaskLabel.png"),
    ],
)
def test_capitals_in_names_do_not_matter(picture: str, beside: str, mask: str, kind: str, tmp_path: Path) -> None:
    files = photos("x.png", "y.png", picture) | {beside: b"own", mask: photo(6)}
    pictures, recorder = load(put_as(kind, tmp_path / "tree", files))
    found = {one.name: one for one in pictures}
    assert found.keys() == {"x.png", "y.png", picture}
    assert found[picture].captions == ("own",)
    assert found[picture].mask is not None
    assert not recorder.notes


@pytest.mark.skipif(not BYTES_IN_NAMES, reason="capitals are the same there")
def test_a_name_that_is_the_same_to_the_letter_comes_first(tmp_path: Path) -> None:
    files = photos("A.png", "a.png", "c.png") | {"a.txt": b"small", "A.txt": b"large"}
    pictures, _ = load(put(tmp_path / "tree", files))
    assert captions(pictures) == {"A.png": ("large",), "a.png": ("small",), "c.png": OWN}
    assert (tmp_path / "tree" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "A.png", "text": "two"}'
    )
    for name in ("a.txt", "A.txt"):
        (tmp_path / "tree" / name).unlink()
    assert captions(load(tmp_path / "tree")[0]) == {"A.png": ("two",), "a.png": ("one",), "c.png": OWN}


@BOTH
def test_side_files_of_no_picture_are_told_once(kind: str, tmp_path: Path) -> None:
    files = {**THREE, "d.txt": b"x", "e.caption": b"\xff", "a.png.txt": b"x", "captions/b.txt": b"x", "notes.md": b"x"}
    files |= {"d_mask.png": photo(4), "x-masklabel.png": photo(5), "masks/y.png": photo(6)}
    pictures, recorder = load(put_as(kind, tmp_path / "tree", files))
    assert captions(pictures) == {"a.png": OWN, "b.png": OWN, "c.png": OWN, "d_mask.png": OWN}
    assert recorder.warnings == [
        "masks/y.png and x-masklabel.png are named like masks, but no pictures use them; they are ignored.",
        "a.png.txt, captions/b.txt, d.txt and e.caption match no picture by name.",
    ]
    assert not load(put_as(kind, tmp_path / "tree", files), captions="prompt")[1].warnings[1:]


@BOTH
def test_many_side_files_of_no_picture_are_one_short_sentence(kind: str, tmp_path: Path) -> None:
    files = THREE | {f"{number:02}.txt": b"x" for number in range(30)}
    _, recorder = load(put_as(kind, tmp_path / "tree", files))
    assert recorder.warnings == ["00.txt, 01.txt, 02.txt, 03.txt, 04.txt and 25 more match no picture by name."]


@BOTH
@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"a.txt": b"", "a.caption": b"told"}, ("told",)),
        ({"a.txt": b"", "metadata.jsonl": b'{"file_name": "a.png", "text": "line"}'}, ("line",)),
        ({"a.txt": b" | \n", "a.caption": b"told"}, ("told",)),
        ({"a.txt": b"text", "a.caption": b"told"}, ("text",)),
        ({"metadata.csv": b"file_name,text\na.png,row\n"}, ("row",)),
        ({"metadata.csv": 'file_name,caption\r\na.png,"one, two"\r\n'.encode("utf-16")}, ("one, two",)),
        ({"metadata.csv": b"text,file_name\n,b.png\nrow | other,./a.png\n"}, ("row", "other")),
        ({"METADATA.JSONL": b'{"file_name": "A.PNG", "text": " line | other"}'}, ("line", "other")),
        (
            {
                "metadata.csv": b"file_name,text\na.png,row\n",
                "metadata.jsonl": b'{"file_name": "a.png", "text": "line"}',
            },
            ("line",),
        ),
        ({"metadata.csv": b"file_name,text\na.png,row\n", "a.caption": b"told"}, ("told",)),
    ],
)
def test_the_first_caption_that_is_not_blank_counts(
    beside: dict[str, bytes], expected: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    pictures, recorder = load(put_as(kind, tmp_path / "tree", THREE | beside))
    assert captions(pictures) == {"a.png": expected, "b.png": OWN, "c.png": OWN}
    assert not recorder.notes


@BOTH
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a.png,row\n", "metadata.csv has no column file_name"),
        (b"file_name;text\na.png;row\n", "metadata.csv has no column file_name"),
        (b"", "metadata.csv has no column file_name"),
        (b"file_name,text\n,row\n", "line 2 of metadata.csv names no picture"),
        (b"file_name,text\na.png,H\xfcndin\n", "metadata.csv is neither UTF-8 nor UTF-16"),
        (b"file_name,text\na.png," + b"x" * 200_000, "metadata.csv is damaged"),
    ],
)
def test_damaged_tables_are_named(content: bytes, words: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(PicturesError) as caught:
        load(put_as(kind, tmp_path / "tree", THREE | {"metadata.csv": content}))
    assert words in caught.value.problem
    assert "file_name,text" in caught.value.remedy


# ---- texts
@BOTH
@pytest.mark.parametrize("name", ["b.txt", "b.caption", "metadata.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_captions_in_the_encodings_of_programs(encoding: str, name: str, kind: str, tmp_path: Path) -> None:
    """PowerShell's `>` writes UTF-16."""
    text = "a photo of sks Hündin on grass\r\n"
    if name == "metadata.jsonl":
        text = '{"file_name": "b.png", "text": "a photo of sks Hündin on grass"}\r\n'
    pictures, recorder = load(put_as(kind, tmp_path / "tree", THREE | {name: text.encode(encoding)}))
    assert captions(pictures)["b.png"] == ("a photo of sks Hündin on grass",)
    assert not recorder.notes


@BOTH
@pytest.mark.parametrize("content", ["sks Hündin".encode("cp1252"), "柴犬".encode("shift-jis")], ids=["cp1252", "jis"])
def test_captions_in_other_encodings_are_all_named(content: bytes, kind: str, tmp_path: Path) -> None:
    files = photos(*(f"{number}.png" for number in range(6)))
    files |= {f"{number}.txt": content for number in range(5)}
    source = put_as(kind, tmp_path / "tree", files)
    with pytest.raises(PicturesError) as caught:
        load(source)
    assert caught.value.problem == (
        "0.txt is neither UTF-8 nor UTF-16; 1.txt is neither UTF-8 nor UTF-16; 2.txt is neither UTF-8 nor UTF-16; "
        "and 2 more."
    )
    assert suggest("captions", "prompt") in caught.value.unworded[1]
    assert len(load(source, captions="prompt")[0]) == 6  # the remedy works


@BOTH
def test_lines_and_bars_separate_captions(kind: str, tmp_path: Path) -> None:
    files = {"a.txt": b"sks  dog sitting\n\n  sks dog, side view | sks\tdog \n", "b.caption": b"one line\r\n"}
    files |= {"metadata.jsonl": b'{"file_name": "c.png", "text": "{token} | a {class}"}'}
    pictures, recorder = load(put_as(kind, tmp_path / "tree", THREE | files), token="sks", class_noun="dog")
    assert captions(pictures) == {
        "a.png": ("sks dog sitting", "sks dog, side view", "sks dog"),
        "b.png": ("one line",),
        "c.png": ("sks", "a dog"),
    }
    assert recorder.notes == ["a.txt: each line is a separate caption, and each sample uses one of them."]


SOURCES: dict[str, Callable[[str], tuple[dict[str, bytes], dict[str, Any]]]] = {
    "a text file": lambda text: (THREE | {"a.txt": text.encode()}, {}),
    "metadata": lambda text: (THREE | {"metadata.csv": f'file_name,text\na.png,"{text}"'.encode()}, {}),
    "the names": lambda text: (THREE | photos(f"{text}.png"), {"captions": "file-names"}),
    "kohya's folder": lambda text: ({f"3_{text}/{name}": content for name, content in THREE.items()}, {}),
    "the prompt": lambda text: (THREE, {"prompt": text}),
}


@product_of(source=SOURCES, kind=KINDS, template=["{class}", "{noun}", "{{token}}"])
def test_every_source_of_captions_refuses_alike(source: Any, kind: str, template: str, tmp_path: Path) -> None:
    """A class noun that is missing, a template that is unknown."""
    files, options = source(f"a photo of {template}")
    with pytest.raises(PicturesError) as caught:
        load(put_as(kind, tmp_path / "tree", files), **options, token="sks", class_noun=" ")
    assert re.search(rf"contains (the unknown placeholder )?{re.escape(template)}", caught.value.problem)
    assert caught.value.remedy.strip()


@product_of(source=SOURCES, kind=KINDS)
def test_every_source_of_captions_means_the_same(source: Any, kind: str, tmp_path: Path) -> None:
    files, options = source("{token} {class} a｜b")
    pictures, _ = load(put_as(kind, tmp_path / "tree", files), **options, token="sks", class_noun="dog")
    assert "sks dog a｜b" in {picture.caption for picture in pictures}


def test_captions_that_are_only_shown_keep_their_templates(tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", THREE | {"a.txt": b"{token} {class} {anything}"})
    assert captions(load(folder, "", keep_templates=True)[0])["a.png"] == ("{token} {class} {anything}",)


# ---- names that are no text
def put_bytes(folder: Path, files: dict[bytes, bytes]) -> Path:
    for name, content in files.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return folder


@pytest.mark.skipif(not BYTES_IN_NAMES, reason="names are text there")
def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfcr"))
    files = {b"caf\xe9%d.png" % number: photo(number) for number in range(3)}
    pictures, recorder = load(put_bytes(place, files | {b"caf\xe91.txt": b"own", b"caf\xe92_mask.png": photo(8)}))
    assert captions(pictures) == {"caf\\xe90.png": OWN, "caf\\xe91.png": ("own",), "caf\\xe92.png": OWN}
    assert [picture.mask is None for picture in pictures] == [True, True, False]
    assert [picture.open().size for picture in pictures] == [(48, 40)] * 3
    assert not recorder.notes
    assert picture_names(place) == list(captions(pictures))
    for name in captions(pictures):
        name.encode()


@pytest.mark.skipif(not BYTES_IN_NAMES, reason="names are text there")
def test_names_that_are_not_utf8_are_no_captions(tmp_path: Path) -> None:
    for content, options in (
        ({b"caf\xe9.png": photo()}, {"captions": "file-names"}),
        ({b"10_caf\xe9/a.png": photo()}, {}),
    ):
        place = tmp_path / str(len(options))
        with pytest.raises(PicturesError, match=r"caf\\xe9.* contains bytes that are not valid text") as caught:
            load(put_bytes(place, content), **options)
        assert suggest("captions", "prompt") in caught.value.unworded[1]
        assert len(load(place, captions="prompt")[0]) == 1  # the remedy works
    whole = put_bytes(Path(os.fsdecode(os.fsencode(tmp_path) + b"/10_caf\xe9")), {b"a.png": photo()})
    with pytest.raises(PicturesError, match="not valid text"):
        load(whole)


def test_a_name_as_it_is_shown() -> None:
    assert shown_name("müde 犬.png") == "müde 犬.png"
    assert shown_name("caf\udce9\n\x1b[1m\ud800.png") == "caf\\xe9\\x0a\\x1b[1m\\ud800.png"


# ---- zip files
ODD_NAMES = {
    "../evil.png": "evil.png",
    "a/../../evil.png": "a/evil.png",
    "/tmp/evil.png": "tmp/evil.png",
    "C:/evil.png": "evil.png",
    "C:evil.png": "evil.png",
    "..\\evil.png": "evil.png",
    "\\\\server\\evil.png": "server/evil.png",
    "Screenshot 10:11:12.png": "Screenshot 10:11:12.png",
    "./x//d.png": "x/d.png",
    "con.png": "con.png",
    "a\x07.png": "a\\x07.png",
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_in_a_zip_is_read_or_told(name: str, tmp_path: Path) -> None:
    """Nothing is unpacked, so no name can do harm."""
    source = zipped(tmp_path / "tree.zip", {**THREE, name: photo(9)})
    pictures, recorder = load(source)
    shown = ODD_NAMES[name]
    read = {picture.name for picture in pictures}
    assert read >= THREE.keys()
    assert shown in read or any(f"The pictures in {shown.rpartition('/')[0]} (1)" in text for text in recorder.warnings)
    assert list(tmp_path.rglob("*")) == [source]
    assert not list(tmp_path.parent.glob("evil*"))


def test_an_odd_name_beside_a_folder_in_a_zip_replaces_nothing(tmp_path: Path) -> None:
    files = {f"rex/{name}": content for name, content in THREE.items()}
    for name in ("Screenshot 10:11:12.png", "../x.png", "/x.png"):
        source = zipped(tmp_path / "tree.zip", {**files, name: photo(9)})
        assert {"rex/a.png", "rex/b.png", "rex/c.png"} <= set(names(source))
        assert len(names(source)) == 4
    source = zipped(tmp_path / "tree.zip", {**files, "notes 10:30.md": b"x", "../evil.txt": b"x"})
    assert names(source) == ["rex/a.png", "rex/b.png", "rex/c.png"]


def patched(path: Path, signature: bytes, offset: int, change: bytes, entry: int) -> Path:
    """Overwrite some bytes behind one of the places where a zip's signature stands."""
    content, start = bytearray(path.read_bytes()), -1
    for _ in range(entry + 1):
        start = content.index(signature, start + 1)
    content[start + offset : start + offset + len(change)] = change
    path.write_bytes(content)
    return path


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "encrypted": (lambda path: patched(path, b"PK\1\2", 8, b"\1", 1), "it is encrypted; create the zip file without a"),
    "damaged": (
        lambda path: patched(path, b"PK\3\4", 30 + 5 + 40, b"\x55\xaa\x55", 1),
        "it is damaged in the zip file",
    ),
    "unknown compression": (
        lambda path: patched(path, b"PK\1\2", 10, b"\x63", 1),
        "its compression method is not supported",
    ),
    "huge": (
        lambda path: patched(path, b"PK\1\2", 24, struct.pack("<I", 600_000_000), 1),
        "it is 600 MB; the limit is 537 MB",
    ),
    "a link": (
        lambda path: patched(path, b"PK\1\2", 38, struct.pack("<I", 0o120777 << 16), 1),
        "it is a symbolic link",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["b.png", "a.txt"])
def test_an_entry_of_a_zip_that_cannot_be_read_is_told_and_left_out(name: str, damage: str, tmp_path: Path) -> None:
    files = {"a.png": THREE["a.png"], name: THREE["b.png"], "c.png": THREE["c.png"]}
    change, words = DAMAGE[damage]
    source = zipped(tmp_path / "tree.zip", files)
    change(source)
    pictures, recorder = load(source)
    left_out = "b.png" if name == "b.png" else "a.png"
    assert [picture.name for picture in pictures] == sorted({"a.png", "b.png", "c.png"} & files.keys() - {left_out})
    assert recorder.warnings[0].startswith(f"{left_out} is skipped: ")
    assert words in recorder.warnings[0]
    assert name in recorder.warnings[0]


def test_what_nobody_reads_in_a_zip_may_be_anything(tmp_path: Path) -> None:
    source = zipped(tmp_path / "tree.zip", {"a.png": photo(1), "film.mp4": b"x", "b.png": photo(2), "c.png": photo(3)})
    patched(source, b"PK\1\2", 24, struct.pack("<I", 3_000_000_000), 1)
    pictures, recorder = load(source)
    assert len(pictures) == 3
    assert not recorder.notes


def test_a_zip_of_which_nothing_can_be_read_says_why(tmp_path: Path) -> None:
    source = zipped(tmp_path / "tree.zip", THREE)
    for entry in range(3):
        patched(source, b"PK\1\2", 8, b"\1", entry)
    with pytest.raises(PicturesError) as caught:
        load(source)
    assert "a.png: it is encrypted; create the zip file without a password" in caught.value.problem


def test_a_name_that_is_twice_in_a_zip_is_told(tmp_path: Path) -> None:
    zipped(tmp_path / "tree.zip", THREE)
    with zipfile.ZipFile(tmp_path / "tree.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.png", photo(4))
    pictures, recorder = load(tmp_path / "tree.zip")
    assert [picture.name for picture in pictures] == ["a.png", "b.png", "c.png"]
    assert recorder.warnings == ["The zip file contains a.png twice; the later one is used."]


def test_names_in_zips_of_macos_are_utf8_without_saying_so(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "Müsli.png")
    source = zipped(tmp_path / "tree.zip", {**THREE, "x" * len(name.encode()): photo(7)})
    source.write_bytes(source.read_bytes().replace(b"x" * len(name.encode()), name.encode()))
    assert not zipfile.ZipFile(source).infolist()[3].flag_bits & 0x800
    assert names(source) == sorted([*THREE, name])


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip", b"PK\5\6" + bytes(17), b"PK\5\6" + b"\xff" * 18])
def test_what_is_no_zip_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tree.zip").write_bytes(content)
    with pytest.raises(PicturesError) as caught:
        load(tmp_path / "tree.zip")
    assert "tree.zip" in caught.value.problem
    assert caught.value.remedy.strip()


# ---- paths
@pytest.mark.parametrize("name", ["the dogs'", '"rex"', " rex ", "'rex", "rex ", "$HOME", "~rex", "%TEMP%", "a\\b"])
def test_a_path_that_exists_is_taken_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "nt":
        pytest.skip("Windows allows no such names")
    put(tmp_path / name, THREE)
    assert names(tmp_path / name) == sorted(THREE)
    monkeypatch.chdir(tmp_path)
    assert names(SubjectTable.checked({"images": name}).images) == sorted(THREE)


@pytest.mark.parametrize("typed", ["'{}'", '"{}"', ' "{}" ', "{} ", "  {}"])
def test_a_path_that_does_not_exist_is_tidied(typed: str, tmp_path: Path) -> None:
    place = put(tmp_path / "rex", THREE)
    assert names(Path(typed.format(place))) == sorted(THREE)
    assert names(SubjectTable.checked({"images": typed.format(place)}).images) == sorted(THREE)


def test_a_path_with_backslashes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "photos" / "rex", THREE)
    monkeypatch.chdir(tmp_path)
    assert find_path(Path("photos\\rex")) == Path("photos/rex")


@pytest.mark.parametrize("path", ["$HOME/rex", "${PHOTOS}/rex", "%USERPROFILE%/rex"])
def test_variables_are_not_filled_in_and_that_is_said(path: str) -> None:
    with pytest.raises(PicturesError) as caught:
        load(Path(path))
    assert path in caught.value.problem
    assert "variables are not expanded" in caught.value.remedy
    with pytest.raises(PicturesError) as caught:
        load(Path("rex 100% $"))
    assert "Variables" not in caught.value.remedy


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pack.trainer.data.tree as module

    put(tmp_path / "tree", photos(*(f"x/{number}.png" for number in range(6))))
    monkeypatch.setattr(module, "_MAX_FILES_BELOW", 5)
    with pytest.raises(PicturesError, match="contain more than 5 files"):
        load(tmp_path / "tree")
    assert len(names(tmp_path / "tree" / "x")) == 6  # of the folder itself, any number


# ---- later
@pytest.mark.parametrize("kind", ["gone", "changed", "unreadable", "masked"])
def test_a_picture_that_changes_after_it_was_read_is_an_error(kind: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", THREE)
    pictures, _ = load(folder, masks="alpha" if kind == "masked" else "files")
    first = pictures[0]
    path = folder / "a.png"
    if kind == "changed":
        path.write_bytes(photo(99))
    else:
        path.unlink()
    if kind == "unreadable":
        path.mkdir()
    with pytest.raises(PicturesError) as caught:
        first.open()
    assert str(path) in caught.value.problem
    assert "tart again" in caught.value.remedy
    assert pictures[1].open().size == (48, 40)


def test_pictures_masks_and_captions_of_a_zip_are_kept(tmp_path: Path) -> None:
    source = zipped(tmp_path / "tree.zip", {**THREE, "a_mask.png": photo(3)})
    pictures, _ = load(source)
    source.unlink()
    assert pictures[0].open().size == (48, 40)
    assert pictures[0].mask is not None
    assert pictures[0].mask().size == (48, 40)


def test_the_mask_of_a_file_is_kept(tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", {**THREE, "a_mask.png": photo(3)})
    pictures, _ = load(folder)
    (folder / "a_mask.png").unlink()
    assert pictures[0].mask is not None
    assert pictures[0].mask().size == (48, 40)


@BOTH
def test_a_tree_can_be_looked_at_twice(kind: str, tmp_path: Path) -> None:
    source = put_as(kind, tmp_path / "tree", THREE)
    for _ in range(2):
        with opened_tree(source) as tree:
            assert list(tree.files) == sorted(THREE)
            assert tree.files["a.png"].read() == THREE["a.png"]
    shutil.rmtree(source) if kind == "folder" else source.unlink()
