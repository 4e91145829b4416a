"""Groups and folds: what is promised, as properties, for lists and for Parquet files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from allmlp.data.check import check_source
from allmlp.data.groups import deal, deal_folds, shared_groups
from allmlp.data.source import Source, values_of
from allmlp.data.sources import notes_of, open_source, open_splits
from allmlp.data.sources.packed import pack_splits
from allmlp.errors import UserError
from allmlp.training.config import DataSettings
from allmlp.training.dataset import split_data
from conftest import draw, encode, user_error


def random_groups(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and groups of some 300 images; groups differ in size and have few classes each."""
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(40))
    groups = np.unique(random.choice(40, 300, p=weights), return_inverse=True)[1]
    tastes = random.dirichlet(np.full(4, 0.5), 40)
    return np.array([random.choice(4, p=tastes[group]) for group in groups]), groups


def deviation(labels: np.ndarray, parts: np.ndarray, fractions: tuple[float, ...]) -> float:
    """The mean difference of a class's fraction in a part from the wanted one."""
    counts = [np.bincount(labels[parts == part], minlength=4) for part in range(len(fractions))]
    return float(np.abs(counts / np.bincount(labels) - np.array(fractions)[:, None]).mean())


def test_folds_of_groups_are_as_even_as_those_of_scikit_learn():
    own, theirs = [], []
    for seed in range(8):
        labels, groups = random_groups(seed)
        dealt = deal(labels, groups, (0.2,) * 5, seed)
        assert set(dealt) == {*range(5)}  # every image in one fold
        assert len(np.unique(groups * 5 + dealt)) == len(np.unique(groups))  # no group in two
        assert (dealt == deal(labels, groups, (0.2,) * 5, seed)).all()
        own.append(deviation(labels, dealt, (0.2,) * 5))
        parts = deal(labels, groups, (0.9, 0.1), seed)
        assert deviation(labels, parts, (0.9, 0.1)) < 0.05
        assert set(labels[parts == 0]) == set(labels)
        other = np.empty_like(labels)
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, at) in enumerate(folds.split(labels, labels, groups)):
            other[at] = fold
        theirs.append(deviation(labels, other, (0.2,) * 5))
    assert np.mean(own) <= np.mean(theirs)


def listed(folder: Path, rows: list[tuple[object, ...]], header: str = "path,label,patient") -> str:
    """A list of images that are all there; the first column is added."""
    lines = []
    for at, row in enumerate(rows):
        (folder / f"{at}.png").write_bytes(encode(Image.new("RGB", (8, 8), (at, 0, 0))))
        lines.append(",".join(map(str, (f"{at}.png", *row))))
    (folder / "list.csv").write_text("\n".join([header, *lines]))
    return str(folder / "list.csv")


def patients(source: Source) -> set[str]:
    """The patient of image n is n // 3, whatever the order."""
    return {str(int(Path(source.item_name(at)).stem) // 3) for at in range(len(source))}


ROWS = [("xy"[at % 2], f"p{at // 3}") for at in range(60)]  # 20 patients of 3 images


def test_a_group_is_on_one_side_of_the_holdout(tmp_path: Path):
    name = listed(tmp_path, ROWS)
    for holdout in (None, 0.3):
        splits = split_data(DataSettings(source=f"{name}#group=patient", holdout=holdout))
        assert not patients(splits.train) & patients(splits.validation)
        assert len(splits.train) + len(splits.validation) == 60
        assert len(splits.validation) == round(60 * (holdout or 0.1))
        assert f"{len(splits.validation) // 3} of 20 groups" in splits.describe()[0]
    plain = split_data(DataSettings(source=name))
    assert patients(plain.train) & patients(plain.validation)


def test_groups_that_cannot_be_held_out(tmp_path: Path):
    three = listed(tmp_path, [("xy"[at % 2], at // 20) for at in range(60)])
    splits = split_data(DataSettings(source=f"{three}#group=patient"))
    assert len(splits.validation) == 20  # more than a tenth, and the least there is
    for rows in ([("xy"[at % 2], "xy"[at % 2]) for at in range(20)], [("x", 1), ("y", 1)]):
        with pytest.raises(UserError, match="no group") as error:
            split_data(DataSettings(source=f"{listed(tmp_path, rows)}#group=patient"))
        assert error.value.fix
    with pytest.raises(UserError, match="'patent'"):
        open_splits(f"{three}#group=patent")
    with pytest.raises(UserError, match="group is empty") as error:
        open_splits(f"{listed(tmp_path, [('x', 'p'), ('y', '')])}#group=patient")
    assert str(error.value.where).endswith("line 3")


def test_folds(tmp_path: Path):
    rows = [("xxy"[at % 3], "train" if at % 2 else "val") for at in range(60)]
    name = listed(tmp_path, rows, "path,label,split")
    held: list[str] = []
    for number in range(1, 6):
        splits = split_data(DataSettings(source=name, fold=(number, 5)))
        own, rest = (
            {s.item_name(at) for at in range(len(s))} for s in (splits.validation, splits.train)
        )
        assert (own & rest, len(own | rest)) == (set(), 60)  # the validation images are folded, too
        assert np.bincount(splits.validation.labels).tolist() == [8, 4]
        held += own
    assert len(held) == len(set(held)) == 60
    source = open_source(f"{listed(tmp_path, ROWS)}#group=patient")
    folds, _ = deal_folds(source, 5)
    assert np.bincount(folds).tolist() == [12] * 5
    assert len({(at // 3, fold) for at, fold in enumerate(folds.tolist())}) == 20
    with pytest.raises(UserError, match="20 groups"):
        deal_folds(source, 21)


def test_the_data_has_folds(tmp_path: Path):
    header = "path,label,patient,fold"
    name = listed(tmp_path, [(*row, 10 if at < 9 else 9) for at, row in enumerate(ROWS)], header)
    source = open_source(name)
    assert any("fold" in note for note in notes_of({"": source}))
    folds, text = deal_folds(source, 2)
    assert folds.tolist() == [1] * 9 + [0] * 51  # 9 before 10
    assert "9, 10" in text
    with pytest.raises(UserError, match="2 folds of its own"):
        deal_folds(source, 5)
    deal_folds(open_source(f"{name}#group=patient"), 2)
    name = listed(tmp_path, [(*row, at % 2) for at, row in enumerate(ROWS)], header)
    with pytest.raises(UserError, match="'p0'"):
        deal_folds(open_source(f"{name}#group=patient"), 2)


def test_an_empty_fold_of_a_test_image(tmp_path: Path):
    rows = [("x", "train", 1), ("y", "train", 2), ("x", "test", "")]
    splits = open_splits(listed(tmp_path, rows, "path,label,split,fold"))
    assert len(splits["test"]) == 1
    assert len(deal_folds(splits["train"], 2)[0]) == 2
    with pytest.raises(UserError, match="fold is empty"):
        deal_folds(splits["test"], 2)


def test_groups_and_folds_are_not_packed_away(tmp_path: Path):
    for column, options in (("patient", "#group=patient"), ("fold", "")):
        name = listed(tmp_path, [("x", 1), ("y", 2)], f"path,label,{column}")
        with user_error("groups"):
            pack_splits(open_splits(name + options), tmp_path / "packed")


def test_groups_in_several_splits_are_reported(tmp_path: Path):
    split = ["train", "val", "test"]
    rows = [(*row, split[at // 20 if at != 58 else 0]) for at, row in enumerate(ROWS)]
    name = listed(tmp_path, rows, "path,label,patient,split") + "#group=patient"
    lines = ["train and validation: p6", "train and test: p19", "validation and test: p13"]
    found = shared_groups(open_splits(name))
    assert [line.removeprefix("1 group in both ") for line in found] == lines
    values, _ = check_source(open_splits(name), name, duplicates="off", num_workers=0)
    assert values["shared_groups"] == found
    notes = split_data(DataSettings(source=name)).notes
    assert sum("group" in note for note in notes) == 3
    assert shared_groups(open_splits(name.partition("#")[0])) == []


def test_columns_of_parquet_files(tmp_path: Path):
    images = [{"bytes": encode(draw(at)), "path": f"{at}.png"} for at in range(12)]
    columns = {"image": images, "label": [0, 1] * 6, "patient": [at // 3 for at in range(12)]}
    columns |= {"is_valid": [at >= 9 for at in range(12)], "fold": [at % 2 for at in range(12)]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet", row_group_size=5)
    splits = open_splits(f"{tmp_path / 'all.parquet'}#group=patient")
    assert {split: len(source) for split, source in splits.items()} == {"train": 9, "validation": 3}
    assert splits["validation"].read(0) == encode(draw(9))
    assert splits["validation"].labels.tolist() == [1, 0, 1]
    assert values_of(splits["train"], "group") == [str(at // 3) for at in range(9)]
    assert values_of(splits["validation"], "fold") == ["1", "0", "1"]
    pq.write_table(pa.table(columns), tmp_path / "all-test.parquet")
    assert list(open_splits(str(tmp_path / "all-test.parquet"))) == ["test"]  # the name says it


@pytest.mark.parametrize(("group", "path"), [("folder", "{}/{}.png"), ("_", "{}_{}.png")])
def test_groups_of_class_folders(tmp_path: Path, group: str, path: str):
    for number in range(40):
        file = tmp_path / "data" / "ab"[number % 2] / path.format(f"p{number // 4}", number)
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(file)
    splits = split_data(DataSettings(source=f"{tmp_path / 'data'}#group={group}", holdout=0.2))
    sides = [set(values_of(part, "group") or ()) for part in (splits.train, splits.validation)]
    assert len(sides[0] | sides[1]) == 10
    assert not sides[0] & sides[1]
    with pytest.raises(UserError, match="group="):
        split_data(DataSettings(source=f"{tmp_path / 'data'}#group=@"))
