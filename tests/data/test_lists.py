"""CSV and JSONL lists: columns, splits, classes by name, and the line of whatever is wrong."""

import json
from pathlib import Path

import pytest

from allmlp.data.sources import notes_of, open_source, open_splits
from allmlp.errors import UserError
from conftest import make_class_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images a/0.png to a/5.png and b/0.png to b/5.png."""
    return make_class_folder(tmp_path, {"a": 6, "b": 6})


def write(folder: Path, text: str | bytes, name: str = "list.csv") -> str:
    data = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(data)
    return str(folder / name)


def write_jsonl(folder: Path, *rows: object) -> str:
    return write(folder, "".join(json.dumps(row) + "\n" for row in rows), "list.jsonl")


def named(name: str) -> dict[str, list[tuple[str, str]]]:
    return {
        split: [
            ("/".join(Path(s.item_name(at)).parts[-2:]), s.class_names[s.labels[at]])
            for at in range(len(s))
        ]
        for split, s in open_splits(name).items()
    }


def test_splits_in_a_column(images: Path):
    rows = ["a/0.png\tx\ttrain", "b/1.png\ty\tval", "a/2.png\ty\tTrain", "a/3.png\tx\ttest"]
    name = write(images, "path\tlabel\tsplit\n" + "\n".join(rows), "list.TXT")
    assert named(name) == {
        "train": [("a/0.png", "x"), ("a/2.png", "y")],
        "validation": [("b/1.png", "y")],
        "test": [("a/3.png", "x")],
    }
    assert open_source(f"{name}:val").class_names == ["x", "y"]
    assert open_source(name).item_name(0) == str(images / "a" / "3.png")
    assert len(open_source(f"{name}:train[50%:]")) == 1


@pytest.mark.parametrize(("valid", "train"), [("True", "False"), ("1", "0"), ("yes", "NO")])
def test_splits_by_is_valid(images: Path, valid: str, train: str):
    rows = [f"a/0.png,x,{train},0", f"b/1.png,x,{valid},1"]
    name = write(images, "path,label,Is_Valid,fold\n" + "\n".join(rows))
    assert named(name) == {"train": [("a/0.png", "x")], "validation": [("b/1.png", "x")]}
    notes = notes_of(open_splits(name))
    assert [column in note for column, note in zip(("Is_Valid", "fold"), notes, strict=True)]
    name = write(images, "path,label,is_valid,split\na/0.png,x,1,train\nb/1.png,x,0,test\n")
    assert list(named(name)) == ["train", "test"]  # a split is more than is_valid
    assert any("is_valid" in note for note in notes_of(open_splits(name)))
    with pytest.raises(UserError, match="'maybe'"):
        open_splits(write(images, "path,label,is_valid\na/0.png,x,maybe\n"))


def test_the_order_of_rows_never_changes_the_classes(images: Path):
    rows = [f"a/{at % 6}.png,{label}" for at, label in enumerate(["10", "9", "2", "10", "1"])]
    expected = None
    for order in (rows, rows[::-1], sorted(rows)):
        source = open_source(write(images, "\n".join(["path,label", *order])))
        assert source.class_names == ["1", "2", "9", "10"]
        pairs = sorted((source.item_name(at), int(source.labels[at])) for at in range(5))
        assert pairs == (expected := expected or pairs)


def test_byte_order_mark_and_windows_line_ends(images: Path):
    text = "\ufeffpath,label\r\na/0.png,x\r\n\r\na/1.png,\u00e9\r\n"
    for data in (text, text[1:].encode("utf-16")):
        source = open_source(write(images, data))
        assert source.class_names == ["x", "\u00e9"]
        assert source.read(1) == (images / "a" / "1.png").read_bytes()


@pytest.mark.parametrize("image", ["path", "file", "FileName", "image", "file_name"])
@pytest.mark.parametrize("label", ["label", "Class", "target"])
def test_columns_are_found_by_their_names(images: Path, image: str, label: str):
    name = write(images, f"id,{label}, {image} ,note\n7,x,a/0.png,n\n")
    assert named(name) == {"train": [("a/0.png", "x")]}


def test_columns_are_chosen(images: Path):
    name = write(images, "file,image,class,target,kind\na/0.png,b/0.png,x,y,z\n")
    other = write(images, "file,path,label\na/0.png,b/0.png,x\n", "other.csv")
    with pytest.raises(UserError, match=r"several image columns: file, path[\s\S]*#image=file"):
        open_splits(other)
    for options in ("", "#image=file"):
        with pytest.raises(UserError, match=r"label columns: class, target[\s\S]*#label=class"):
            open_splits(f"{name}{options}")
    assert named(f"{name}#image=image,label=kind") == {"train": [("b/0.png", "z")]}
    with pytest.raises(UserError, match=r"unknown column 'knd'[\s\S]*Did you mean kind"):
        open_splits(f"{name}#image=file,label=knd")
    with pytest.raises(UserError, match="'config'"):
        open_splits(f"{name}#config=x")


def test_a_file_name_that_is_no_text(images: Path):
    name = b"\xff\xfe.png"
    Path(images, name.decode(errors="surrogateescape")).write_bytes(b"x")
    source = open_source(write(images, b"path,label\n" + name + b",x\n"))
    assert source.read(0) == b"x"


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "the list has no rows", ""),
        ("path,label,path\na/0.png,x,y\n", "'path'", ", line 1"),
        ("label,kind\nx,y\n", "no image column found; columns: label, kind", ""),
        ("path,kind\na/0.png,y\n", "no label column found; columns: kind", ""),
        ("a/0.png,x\na/1.png,y\n", "no image column found; columns: a/0.png, x", ""),
        ("path,label\na/0.png,x\na/1.png\n", "fewer fields than the 2 of the header", ", line 3"),
        ("path,label\na/0.png,x\n,y\n", "not the name of a file: ''", ", line 3"),
        ("path,label\na/0.png,x\n\na/1.png, \n", "the label is empty", ", line 4"),
        ("path,label\na/0.png,Cat\na/1.png,cat\n", "Cat.*line 2.*cat", ", line 3"),
        ('path,label\na/0.png,"x\na/1.png,y\n', "not CSV: unexpected end of data", ", line 3"),
        ("path,label,split\na/0.png,x,train\na/1.png,x,trn\n", "unknown split 'trn'", ", line 3"),
        ("path,label,split\na/0.png,x,train\na/1.png,y,val\n", "'y'", None),
        (b"path,label\na/0.png,x\xff\n", "not valid text: 'x.udcff'", ", line 2"),
        ("path,label\na/0.png,0\na/1.png,1\na/2.png,-1\n", "no label .-1.", ", line 4"),
        ("path,label\n9/0.png,x\n", "none of the listed images exists, such as '9/0.png'", ""),
    ],
)
def test_mistakes_in_csv(images: Path, text: str | bytes, message: str, line: str):
    name = write(images, text)
    with pytest.raises(UserError, match=message) as raised:
        open_splits(name)
    if line is not None:
        assert raised.value.where in (name + line, str(images / "9" / "0.png"))
    assert raised.value.fix


def test_what_is_accepted(images: Path, tmp_path_factory: pytest.TempPathFactory):
    name = write(images, "path,class,label\na/0.png,x,y\n")
    assert named(name) == {"train": [("a/0.png", "y")]}  # label wins over other names
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    name = write(elsewhere, f"path,label\n{images / 'a' / '0.png'},x\n")
    assert open_source(name).read(0) == (images / "a" / "0.png").read_bytes()
    name = write(images, "path,label\na/0.png,x\na/1.png,y\na/0.png,x\n")
    assert any("twice in 1 row of list.csv" in note for note in notes_of(open_splits(name)))
    name = write(images, "path,label\na/0.png,1\na/1.png,-1\n")
    assert open_source(name).class_names == ["-1", "1"]


@pytest.mark.parametrize("columns", ["path,split", "path,label,split", "file,id,split"])
def test_lists_without_labels(images: Path, columns: str):
    more = {"path,split": ("", ""), "path,label,split": (",", ","), "file,id,split": (",1", ",2")}
    rows = zip(("a/0.png", "a/1.png"), more[columns], (",train", ",test"), strict=True)
    name = write(images, "\n".join([columns, *map("".join, rows)]))
    for at, split in enumerate(("train", "test")):
        source = open_source(f"{name}:{split}", labels="any")
        assert source.read(0) == (images / "a" / f"{at}.png").read_bytes()
        assert source.class_names == ["unknown"]
        assert len(open_source(f"{name}:{split}[:100%]", labels="any")) == 1
    with pytest.raises(UserError, match="label"):
        open_source(name)


def test_jsonl(images: Path):
    rows = [{"label": label, "x": [1, {}]} for label in (10, 2, 1.0, True, "1")]
    rows = [{**row, "path": f"a/{at}.png"} for at, row in enumerate(rows)]
    source = open_source(write_jsonl(images, *rows))
    assert source.class_names == ["1", "2", "10", "true"]
    assert source.labels.tolist() == [2, 1, 0, 3, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ('{"path": "a/1.png"}', "the label is empty"),
        ('{"path": "a/1.png", "label": NaN}', "the label is empty: 'nan'"),
        ('{"path": "a/1.png", "label": 1.5}', "a label is a whole number or text, got 1.5"),
        ('{"path": 3, "label": "x"}', "not the name of a file: 3"),
        ('{"path": "a\\ud800", "label": "x"}', "not the name of a file"),
    ],
)
def test_mistakes_in_jsonl(images: Path, line: str, message: str):
    name = write(images, '{"path": "a/0.png", "label": "x"}\n\n' + line + "\n", "list.jsonl")
    with pytest.raises(UserError, match=message) as raised:
        open_splits(name)
    assert raised.value.where == f"{name}, line 3"
    name = write_jsonl(images, {"path": "a/0.png"}, {"path": "a/1.png", "label": "x"})
    with pytest.raises(UserError, match="the label is empty"):
        open_splits(name)


@pytest.mark.parametrize("other", ["a/0.png", "./b/../a/0.png", "linked/0.png", "{folder}/a/0.png"])
def test_one_image_in_two_splits_or_with_two_labels(images: Path, other: str):
    (images / "linked").symlink_to(images / "a")
    other = other.format(folder=images)
    rows = ["a/0.png,x,train", "a/1.png,y,train", "b/0.png,x,test"]
    for row, shown in (("x,test", ["train", "test"]), ("y,train", ["'x'", "'y'"])):
        name = write(images, "\n".join(["path,label,split", *rows, f"{other},{row}"]))
        for opener in (open_source, open_splits):
            with pytest.raises(UserError, match="line 2") as refused:
                opener(name)
            assert refused.value.where == f"{name}, line 5"
            assert all(name in refused.value.what for name in shown)
        assert len(open_source(f"{name}:train", labels="any")) >= 2  # nobody asks for labels


def test_columns_that_look_like_splits_or_groups_are_named(images: Path):
    columns = ["subset", "folds", "patientId", "subject_id", "group"]
    name = write(images, f"path,label,note,{','.join(columns)}\na/0.png,x,1,1,1,1,1,1\n")
    (note,) = notes_of(open_splits(name))
    assert all(column in note for column in columns)
    assert "note," not in note
    (note,) = notes_of(open_splits(f"{name}#group=patientId"))
    assert "patientId" not in note
    name = write(images, "path,label,width,valuation,label_name\na/0.png,x,1,2,3\n")
    assert notes_of(open_splits(name)) == []


def test_paths_of_windows(images: Path):
    (images / "lists").mkdir()
    text = "path,label\r\n..\\a\\0.png,x\r\n..\\b\\1.png,y\r\n"
    assert named(write(images / "lists", text)) == {"train": [("a/0.png", "x"), ("b/1.png", "y")]}
    (images / "a\\0.png").write_bytes(b"x")  # a name of a file here
    assert open_source(write(images, "path,label\na\\0.png,x\n")).read(0) == b"x"
