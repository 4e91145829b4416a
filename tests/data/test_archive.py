"""Zip and tar files are folders: the same classes, images and fingerprint, and no surprises."""

import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

import allmlp as am
from allmlp.data.fingerprint import fingerprint
from allmlp.data.sources import is_data, open_source, open_splits
from allmlp.errors import UserError
from conftest import best_of, draw, encode, mixer, ran, tiny_run, write_tar


def packed(folder: Path, ending: str, inside: str = "") -> Path:
    path = folder.with_name(f"photos{ending}")
    with zipfile.ZipFile(path, "w") if ending == ".zip" else tarfile.open(path, "w") as archive:
        for at, file in enumerate(file for file in sorted(folder.rglob("*")) if file.is_file()):
            method = [(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[at % 2]] * (ending == ".zip")
            add = archive.add if isinstance(archive, tarfile.TarFile) else archive.write
            add(file, f"{inside}{file.relative_to(folder)}", *method)
    return path


@pytest.mark.parametrize("inside", ["", "./", "photos/"])
@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_an_archive_is_a_folder(class_folder: Path, ending: str, inside: str):
    path = packed(class_folder, ending, inside)
    own, theirs = open_splits(str(path)), open_splits(str(class_folder))
    assert list(own) == list(theirs) == ["train", "validation"]
    for split, source in theirs.items():
        assert own[split].class_names == source.class_names
        assert own[split].labels.tolist() == source.labels.tolist()
        assert all(own[split].read(at) == source.read(at) for at in range(len(source)))
        assert fingerprint(own[split], moved=True) == fingerprint(source, moved=True)
    assert len(open_source(f"{path}:train[50%:]")) == 10
    inner = f"{path}/{inside}train".replace("./", "")
    assert open_source(inner).class_names == theirs["train"].class_names


def test_a_run_on_an_archive_and_what_reads_it(class_folder: Path, tmp_path: Path, capsys):
    path = packed(class_folder, ".zip", "photos/")
    run = tiny_run(path, tmp_path / "run", epochs=1).run_folder
    shutil.copytree(run, tmp_path / "again")
    plain = tiny_run(class_folder, tmp_path / "plain", epochs=1)
    assert best_of(run) == best_of(plain.run_folder)
    code, _, err = mixer(capsys, "train", "--resume", run, "--data", class_folder)  # unpacked since
    assert (code, err) == (0, "")
    rows = am.predict(run, str(path), device="cpu", num_workers=0)  # all its images, as in a folder
    assert len(rows) == 29
    assert all(row.error is None for row in rows)
    one = am.predict(run, [rows[3].path, str(class_folder)], device="cpu", num_workers=0)
    assert one[0].classes == rows[3].classes
    assert len(one) == 30
    assert not is_data(str(path))
    reports = [ran(capsys, "data", "check", data)[0] for data in (path, class_folder)]
    assert reports[0].replace(str(path), "") == reports[1].replace(str(class_folder), "")


def write(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


IMAGE = encode(draw(0))
TWO = {"cat/1.png": IMAGE, "dog/1.png": IMAGE}


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "cat/../../x.png"])
def test_names_that_leave_the_archive(tmp_path: Path, name: str):
    own = write(tmp_path / "x.zip", **TWO, **{name: IMAGE})
    for bad in (own, write_tar(tmp_path / "x.tar", [(name, IMAGE)])):
        with pytest.raises(UserError, match="outside") as error:
            open_splits(str(bad))
        assert repr(name) in error.value.what


def test_links_and_other_members_are_passed_over(tmp_path: Path):
    names = write_tar(tmp_path / "x.tar", TWO.items())
    with tarfile.open(names, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"cat/{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert len(open_source(str(tmp_path / "x.tar"))) == 2
    link = zipfile.ZipInfo("cat/2.png")
    link.external_attr = 0o120777 << 16
    more = {"cat/3.jp2": b"x", "__MACOSX/cat/._1.png": b"x"}
    path = write(tmp_path / "x.zip", **TWO, **more)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    source = open_source(str(path))
    found = [source.item_name(at) for at in range(len(source))]
    assert found == [f"{path}/cat/1.png", f"{path}/dog/1.png"]


def test_damaged_and_unsuitable_archives(tmp_path: Path):
    good = write(tmp_path / "good.zip", **TWO).read_bytes()
    (tmp_path / "cut.zip").write_bytes(good[:-30])
    (tmp_path / "cut.tar").write_bytes(IMAGE * 20)
    whole = bytearray(write_tar(tmp_path / "x.tar", TWO.items()).read_bytes())
    whole[whole.index(b"dog/1.png")] ^= 1  # tarfile takes it for the end
    (tmp_path / "header.tar").write_bytes(whole)
    for name in ("cut.zip", "cut.tar", "header.tar"):
        with pytest.raises(UserError, match="not a complete archive"):
            open_splits(str(tmp_path / name))
    (tmp_path / "flipped.zip").write_bytes(good[:60] + bytes([good[60] ^ 255]) + good[61:])
    with pytest.raises(UserError, match="damaged in its archive"):
        open_source(str(tmp_path / "flipped.zip")).read(0)
    write(tmp_path / "bomb.zip", **{"cat/1.png": bytes(10**7), "dog/1.png": IMAGE})
    bomb = bytearray((tmp_path / "bomb.zip").read_bytes())
    at = bomb.index(b"PK\1\2")
    assert struct.unpack_from("<I", bomb, at + 24) == (10**7,)
    for claimed in (1000, 2**30):  # fewer bytes than there are, and more than any image has
        struct.pack_into("<I", bomb, at + 24, claimed)
        (tmp_path / "bomb.zip").write_bytes(bomb)
        with pytest.raises(UserError, match="larger" if claimed > 1000 else "damaged"):
            open_source(str(tmp_path / "bomb.zip")).read(0)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "good.zip", "cat/1.png")
    with pytest.raises(UserError, match="compressed"):
        open_splits(str(tmp_path / "x.tar.gz"))
    with pytest.raises(OSError, match="good"):
        open_splits(f"{tmp_path / 'good.zip'}/none")
