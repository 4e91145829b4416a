"""Reads small JPEGs in random order from tars, Arrow and Parquet files; prints seconds and ratios.

All files are in the page cache, so this measures the readers and not the disk.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from allmlp.data.source import EncodedImages, labelled
from allmlp.data.sources import open_source
from allmlp.data.sources.packed import pack_splits
from allmlp.data.sources.parquet import ParquetImages, open_file


def encoded(number: int) -> list[bytes]:
    random, files = np.random.default_rng(0), []
    for _ in range(number):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((96, 96)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_tar(path: Path, files: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for at, data in enumerate(files):
            for ending, content in (("jpg", data), ("cls", b"0")):
                info = tarfile.TarInfo(f"{at:08d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def mapped(path: Path) -> Callable[[int], bytes]:
    """Reads the rows of an Arrow file through a memory map."""
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    chunks = [chunk.field("bytes") for chunk in table["image"].chunks]
    starts = np.cumsum([0, *map(len, chunks)])

    def read(index: int) -> bytes:
        chunk = int(np.searchsorted(starts, index, side="right")) - 1
        return chunks[chunk][index - int(starts[chunk])].as_py()

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    files = encoded(options.images)
    print(f"{len(files):,} files of {np.mean([len(data) for data in files]):,.0f} bytes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("tar", "arrow", "parquet"):
            (folder / kind).mkdir()
        write_tar(folder / "tar" / "train.tar", files)
        labels = np.zeros(len(files), np.int64)
        source = labelled(EncodedImages(files, "x"), "x", ["a"], labels)
        began = time.perf_counter()
        packed = pack_splits({"train": source}, folder / "arrow", shard_bytes=2**31 - 1)["train"]
        print(f"written in {time.perf_counter() - began:.1f} s")
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": data, "path": None} for data in files], kind)
        table = pa.table({"image": images, "label": labels})
        path = folder / "parquet" / "train.parquet"
        parquet.write_table(table, path, row_group_size=100, compression="none")
        rows = ParquetImages(str(path), "image", open_file(str(path)).metadata)
        began = time.perf_counter()
        arrow = open_source(str(folder / "arrow"))
        print(f"Arrow opened in {1000 * (time.perf_counter() - began):.0f} ms")
        readers: dict[str, Callable[[int], bytes]] = {
            "tar, by offset": open_source(str(folder / "tar")).read,
            "Arrow, by offset": arrow.read,
            "Arrow, memory-mapped": mapped(folder / "arrow" / packed.files[0].name),
            "Parquet, row groups of 100": rows.read,
        }
        order = np.random.default_rng(1).permutation(len(files)).tolist()
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.rounds):  # in turns, as the machine's speed varies
            for name, read in readers.items():
                few = order if "Parquet" not in name else order[:1000]
                began = time.perf_counter()
                for index in few:
                    read(index)
                took = time.perf_counter() - began
                seconds[name].append(took / len(few))
        best = {name: min(times) for name, times in seconds.items()}
        for name, took in best.items():
            print(f"{name:28} {1e6 * took:8.2f} us per image, {took / best['tar, by offset']:.2f}")
        assert all(read(7) == files[7] for read in readers.values())


if __name__ == "__main__":
    main()
