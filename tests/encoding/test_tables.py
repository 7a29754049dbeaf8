"""Tables and lists of prompts as other programs write them: each row as it was meant, or an error with its place."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from flowanchor.base.tables import read_captions, read_lines, read_rows
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.errors import DataError
from flowanchor.generation.prompts import read_prompts

BOM = b"\xef\xbb\xbf"


def table(folder: Path, content: bytes, name: str = "c.csv") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("c.csv", b"file,caption\n0.png,a fox\n1.png,an owl\n", ["a fox", "an owl"]),
        ("c.csv", BOM + b"file,caption\r\n0.png,a fox\r\n1.png,an owl\r\n", ["a fox", "an owl"]),  # Excel's UTF-8
        (
            "C.CSV",
            b'caption,file\n"a fox, red, in snow",0.png\n"an ""owl""",1.png\n',
            ["a fox, red, in snow", 'an "owl"'],
        ),
        ("c.csv", b'file,caption\n0.png,"two\nlines"\n\n1.png,a "quoted" owl', ["two\nlines", 'a "quoted" owl']),
        ("c.csv", b"file,caption,\n0.png,a fox,,,\n1.png,an owl\n", ["a fox", "an owl"]),  # empty cells at the end
        (
            "c.jsonl",
            BOM + b'{"file": "0.png", "caption": "a fox"}\n\n{"file": "1.png", "caption": ["an owl"]}',
            ["a fox", "an owl"],
        ),
        (
            "c.JSONL",
            b'{"caption": "\xc3\xa9t\xc3\xa9", "file": "0.png"}\r\n{"file": "1.png", "caption": "b"}',
            ["\xe9t\xe9", "b"],
        ),
        ("c.jsonl", json.dumps({"file": "0.png", "caption": "x" * 200_000}).encode(), ["x" * 200_000]),
        ("c.tsv", b'file\tcaption\n0.png\ta fox, red\n1.png\t"an\towl"\n', ["a fox, red", "an\towl"]),
    ],
)
def test_what_other_programs_write(tmp_path, name, content, expected):
    path = table(tmp_path, content, name)
    source = open_captions(str(tmp_path))
    assert [texts[0] for texts in source.captions] == expected == read_captions(path) == read_prompts(path)
    assert source.names == ["0.png", "1.png"][: len(expected)]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        (
            "c.csv",
            b"file,caption\n0.png,ok\n1.png,a fox, red, in snow\n",
            r"Row 2 of .* cannot be read \(4 cells, and the first line has 2: .*in double quotes\), line 3: correct it",
        ),
        ("c.csv", b'file,caption\n0.png,"a fox\n1.png,b\n', r"Row 1 of .* cannot be read \(.*unexpected end.*line 3"),
        ("c.csv", b'file,caption\n0.png,"a" fox\n', r"Row 1 of .*cannot be read \(.*expected after.*\), line 2"),
        ("c.csv", b"file,caption\n0.png,a\n1.png,caf\xe9\n", r"Row \d of .* cannot be read \(not UTF-8\), line \d"),
        ("c.csv", "file,caption\n0.png,a\n".encode("utf-16"), r"Row 1 of .* cannot be read \(not UTF-8\)"),
        ("c.csv", b"file,caption,file\n0.png,a,b\n", r"Row 1 of .*two columns of one name: file, caption, file"),
        (
            "c.csv",
            b"file;caption\n0.png;a\n",
            r"Row 1 of .*no columns 'file' and 'caption' \(it has file;caption\), line 2",
        ),
        ("c.csv", b"caption,file\na fox\n", r"Row 1 of .* names no image under 'file' .*, line 2"),
        ("c.csv", b"file,caption\n\n0.png,a\n,b\n", r"Row 2 of .* names no image under 'file' .*, line 4"),
        ("c.jsonl", b'{"file": "a", "caption": "b"}\n\n{"fi', r"Row 2 of .* cannot be read \(JSONDecodeError.*line 3"),
        (
            "c.jsonl",
            b'{"file": "a", "caption": "b"}\n{"caption": "b"}',
            r"Row 2 of .*names no image under 'file' .*, line 2",
        ),
        (
            "c.jsonl",
            b'{"file": "a", "caption": "b"}\n[1]',
            r"Row 2 of .*cannot be read \(list where an object belongs\), line 2",
        ),
    ],
)
def test_rows_that_cannot_be_meant_so(tmp_path, name, content, sentence):
    """The network would learn 'a fox', or rows would vanish into the one before."""
    table(tmp_path, content, name)
    with pytest.raises(DataError, match=sentence):
        open_captions(str(tmp_path))


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_a_table_without_the_columns(tmp_path, name):
    rows = [{"image": "0.png", "text": "a fox"}, {"image": "1.png", "text": "an owl"}]
    separator = "," if name == "c.csv" else "\t"
    lines = [separator.join(cells) for cells in (rows[0], *(row.values() for row in rows))]
    lines = [json.dumps(row) for row in rows] if name == "c.jsonl" else lines
    path = table(tmp_path, "\n".join(lines).encode(), name)
    with pytest.raises(DataError, match=r"\(it has image, text\).* captions.file= and captions.caption="):
        open_captions(str(tmp_path))
    with pytest.raises(DataError, match=r"Row 1 of .* has no column 'caption' \(it has image, text\), line"):
        read_captions(path)


def test_rows_without_a_caption_are_counted(tmp_path, recwarn):
    """The first one, too: JSONL says of each row what there is."""
    path = table(tmp_path, b'{"file": "0.png"}\n{"file": "1.png", "caption": "an owl"}\n', "c.jsonl")
    assert read_prompts(path) == ["an owl"]
    assert "1 of the 2 rows of " in str(recwarn.pop(UserWarning).message)
    source = open_captions(str(tmp_path))
    assert (source.names, source.captions) == (["1.png"], [("an owl",)])


def test_row_and_line_are_counted_apart(tmp_path):
    path = table(tmp_path, b'caption\n"a\nb"\n\nc\n')
    assert [(row.number, row.line, row.cells["caption"]) for row in read_rows(path, "caption")] == [
        (1, 3, "a\nb"),
        (2, 5, "c"),
    ]


def test_the_row_that_is_not_utf8_is_named(tmp_path):
    """Behind five thousand that are; and of an old Mac, whose lines end otherwise."""
    rows = [f"{number}.png,x" for number in range(5000)]
    for end in ("\n", "\r\n", "\r"):
        content = end.join(["file,caption", *rows]).encode()
        path = table(tmp_path, content)
        assert len(read_captions(path)) == 5000
        if end != "\r":
            table(tmp_path, content + f"{end}5000.png,caf".encode() + b"\xe9")
            with pytest.raises(DataError, match=r"Row 5001 of .* cannot be read \(not UTF-8\), line 5002"):
                read_captions(path)


def test_hidden_tables_are_none(tmp_path):
    table(tmp_path, b"file,caption\n0.png,a\n")
    table(tmp_path, b"\0\5\x16\7", "._c.csv")
    assert len(open_captions(str(tmp_path))) == 1


def test_prompts_one_per_line(tmp_path):
    path = table(tmp_path, BOM + "a fox\r\n\r\n  un été \nparts\u2028of one\n".encode(), "p.txt")
    assert read_prompts(path) == ["a fox", "un été", "parts\u2028of one"] == list(read_lines(path))
    table(tmp_path, b"a fox\ncaf\xe9\n", "p.txt")
    with pytest.raises(DataError, match=r"Line 2 of .*p\.txt cannot be read \(not UTF-8\)"):
        read_prompts(path)


def as_tar(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name.replace("_", "."))
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@pytest.mark.parametrize("order", [("a_txt", "a_json"), ("a_json", "a_txt")])
@pytest.mark.parametrize("told", [b'{"width": 3}', b'{"caption": ""}', b'{"caption": null}'])
def test_a_text_is_replaced_by_a_text_alone(tmp_path, order, told):
    """As img2dataset writes them: the caption in .txt, the rest in .json."""
    notes = {"a_txt": BOM + "a fox, été".encode(), "a_json": told}
    as_tar(tmp_path / "0.tar", a_png=b"x", **{name: notes[name] for name in order})
    assert open_captions(str(tmp_path)).captions == [("a fox, été",)]


def test_a_text_in_a_tar_that_is_not_utf8_is_named(tmp_path):
    as_tar(tmp_path / "0.tar", a_png=b"x", a_txt=b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt of .*0\.tar is not UTF-8: correct it"):
        open_captions(str(tmp_path))


def test_files_whose_names_are_no_text(tmp_path):
    """A folder's name that is no UTF-8 stands in messages, escaped, and its pictures can be read."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    table(folder, b"file,caption\n0.png,a\n")
    (folder / "0.png").write_bytes(b"x")
    assert open_captions(str(folder)).read(0) == b"x"
    table(folder, b"file,caption\n0.png,a,b\n")
    with pytest.raises(DataError, match=r"Row 1 of .*caf\\udce9/c\.csv"):
        open_captions(str(folder))
