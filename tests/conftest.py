"""What many tests share: small drawn images, class folders, small runs, and the command."""

import contextlib
import hashlib
import io
import os
import pickle
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import allmlp as am
from allmlp import plots
from allmlp.cli.main import main
from allmlp.data.source import Source
from allmlp.data.sources import open_splits
from allmlp.errors import UserError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# A job in the background of a script ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of `pytest -n` share the cores, and so does what they start.
_neighbours = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _neighbours > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _neighbours))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


NO_PROCESS = 2**22 + 1  # Linux gives no process such a number


def draw(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image, width x height, of noise on a colour that the seed chooses."""
    random = np.random.default_rng(seed)
    color = random.integers(0, 200, size=3)
    pixels = color + random.integers(0, 55, size=(size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    """The tags of an image that is to be turned when it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_class_folder(folder: Path, classes: dict[str, int], start: int = 0) -> Path:
    """FOLDER/<class>/<n>.png with so many drawn images each."""
    seed = start
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw(seed).save(folder / name / f"{number}.png")
            seed += 1
    return folder


def make_colours(
    folder: Path, counts: dict[str, int], start: int = 0, wrong: Mapping[str, str] = {}
) -> Path:
    """FOLDER/<class>/<nn>.png, each class a colour with a little noise; `wrong` have another's."""
    hues = {"blue": (20, 20, 230), "green": (20, 230, 20), "red": (230, 20, 20)}
    random = np.random.default_rng(start)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for path in (f"{name}/{number:02}.png" for number in range(count)):
            pixels = np.array(hues[wrong.get(path, name)]) + random.integers(-15, 15, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / path)
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_data(folder: Path) -> Path:
    """Twenty training and nine validation images of three classes."""
    make_class_folder(folder / "train", {"ant": 6, "bee": 8, "cat": 6})
    make_class_folder(folder / "val", {"ant": 3, "bee": 3, "cat": 3}, start=100)
    return folder


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture
def source(class_folder: Path) -> Source:
    """The training images of `class_folder`."""
    return open_splits(str(class_folder))["train"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for the runs of a module, which may lie beside it."""
    return make_data(tmp_path_factory.mktemp("runs") / "data")


@pytest.fixture(scope="module")
def straight(data: Path) -> Path:
    """A run of `runs` on these that nothing stopped."""
    import runs

    return runs.train(runs.run_config(data, data.parent / "straight", **runs.DROPOUT))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The weights and data of `studies`."""
    import studies

    return studies.make_place(tmp_path)


TINY = {
    "patch_size": 4,
    "hidden_dim": 16,
    "num_blocks": 2,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 32,
}


def tiny_config(source: str, output: Path, **changes: object) -> am.TrainConfig:
    """A run that takes a second, of any source."""
    config = am.recipe("scratch")
    values: dict[str, object] = {"data.source": source, "output": str(output)}
    values |= {"model.image_size": 8, "epochs": 2, "batch_size": 8, "evaluate_every": 1}
    values |= {"device": "cpu", "model.overrides": TINY, "data.num_workers": 0}
    for key, value in {**values, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        config = config.with_value(key, value)
    return config


def tiny_run(source: object, output: Path, **changes: object) -> am.TrainResult:
    """Trains with `tiny_config`."""
    return am.train(tiny_config(str(source), output, **changes), quiet=True)


def best_of(run: Path) -> bytes:
    """The best weights of a run."""
    return (run / "best" / "model.safetensors").read_bytes()


DRAWN = (
    *("confusion_matrix", "reliability_diagram", "prediction_grid", "worst_mistakes"),
    *("training_batch", "curves"),
)
REAL = {name: getattr(plots, name) for name in (*DRAWN, "save")}


@pytest.fixture(scope="session", autouse=True)
def blank_figures() -> Iterator[None]:
    """One pixel each: to draw them is nine tenths of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(plots, name, lambda *_: None)
        pixel = Image.new("L", (1, 1))
        patch.setattr(plots, "save", lambda _, path: pixel.save(path, "PNG"))
        yield


@pytest.fixture
def real_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in REAL.items():
        monkeypatch.setattr(plots, name, function)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> am.TrainResult:
    """A short run on the digits, one for all processes; nobody may change its folder."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / "result").exists():
            changes = {"epochs": 3, "output": str(folder / "run"), "device": "cpu"}
            changes |= {"model.overrides.num_blocks": 2, "data.num_workers": 0}
            config = am.recipe("digits").with_values(changes)
            (folder / "result").write_bytes(pickle.dumps(am.train(config, quiet=True)))
        return pickle.loads((folder / "result").read_bytes())


def tiny_model(
    num_classes: int | Sequence[str] = 7, image_size: int | tuple[int, int] = 8, **changes: object
) -> am.ImageClassifier:
    """An 8x8-pixel Mixer with random weights everywhere, also in its head."""
    torch.manual_seed(0)
    number = num_classes if isinstance(num_classes, int) else len(num_classes)
    model = am.create_model("mixer_s16", image_size, number, **{**TINY, **changes})
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight)
    if not isinstance(num_classes, int):
        model.class_names = [*num_classes]
    return model


def check_every_gradient(model: am.ImageClassifier) -> None:
    """Every parameter has a gradient, which is zero only where exact arithmetic makes it so.

    Args:
        model: in float64, where rounding is 1e-16 of the largest gradient and no other below 1e-6.
    """
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters()}
    assert all(np.isfinite(list(largest.values())))
    limit = 1e-9 * max(largest.values())
    is_silent = isinstance(model, am.MlpMixer) and model.config.token_mixing == "shared"
    silent = {n for n in largest if is_silent and n.endswith("token_mixing.dense_1.bias")}
    assert {name for name, value in largest.items() if value <= limit} == silent


def mixer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs the command in this process; returns exit code, standard output and error."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Runs a command that must succeed; returns standard output and error."""
    code, out, err = mixer(capsys, *arguments)
    assert code == 0, out + err
    return out, err


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Runs a command that ends with one message and changes nothing in the folder; returns it."""
    before = files(folder)
    code, out, err = mixer(capsys, *arguments)
    assert (code, out, err.count("error: ")) == (2, "", 1), out + err
    assert "Traceback" not in err
    assert files(folder) == before
    return err


@contextlib.contextmanager
def user_error(code: str, *named: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block ends with a UserError of this code, whose message holds these words."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code
    assert all(str(word) in str(caught.value) for word in named)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path) -> dict[str, str]:
    """Returns every file with its content, and every folder, to see that nothing changed."""
    found = sorted(folder.rglob("*"))
    return {str(path): digest(path) if path.is_file() else "folder" for path in found}
