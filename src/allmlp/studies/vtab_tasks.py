"""The 19 tasks of VTAB-1k (Zhai et al. 2019), and the five of the paper's "Avg 5", as data.

The index ranges are those of task_adaptation, in the order in which tfds stores the images: the
first 800 of train to learn from, 200 to choose by, all of test to measure on. Crop and mirror are
those of appendix F of Big Transfer (Kolesnikov et al. 2020), which Google's ViT and Mixer took
over: nothing is mirrored or cut where that would change the answer.

Image size: the paper brings Mixers to 224 pixels for sets of small pictures and to 448 for those of
large ones. Small is the BiT-HyperRule's: fewer than 96 x 96 pixels, so that Patch Camelyon and
smallNORB, of just 96 x 96, count as large.
"""

from __future__ import annotations

from dataclasses import dataclass

from allmlp.console import table
from allmlp.data.label_rules import LabelRule

GROUPS = ("natural", "specialised", "structured")


@dataclass(frozen=True)
class Task:
    """A task of a suite.

    Attributes:
        name: to name it by.
        group: one of `GROUPS`; "" in Avg 5.
        num_classes: of the official data.
        tfds: the data set of tfds that it stands for.
        train, validation, test: the official parts, in the order of tfds; () where all are taken.
        pixels: width and height of its pictures, as they typically are.
        crop, flip: whether training may cut parts out and mirror.
        labels: the rule that makes its classes from numbers; None where they are classes already.
        number: what the number is that the rule takes.
        recipe: of its fine-tuning.
        images: "train" and "test" images of the official data, where all are taken.
    """

    name: str
    group: str
    num_classes: int
    tfds: str
    train: str
    validation: str
    test: str
    pixels: tuple[int, int]
    crop: bool = True
    flip: bool = True
    labels: LabelRule | None = None
    number: str = ""
    recipe: str = "finetune_vtab"
    images: dict[str, int] | None = None

    @property
    def image_size(self) -> int:
        """224 for small pictures, 448 for others; see the module."""
        width, height = self.pixels
        return 224 if width * height < 96 * 96 else 448


_N, _SP, _ST = GROUPS
_T = "train[:800]"
_V = "validation[:200]"
_CLOSEST = LabelRule("between", (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0))
_VEHICLE = LabelRule("between", (-100.0, 8.0, 20.0, 999.0, 1e9))
_X, _ORIENTATION = LabelRule("bins", (32, 16)), LabelRule("bins", (40, 16))
_COUNT = LabelRule("shift", (3, 8))
_DSPRITES = ("dsprites:2", _T, "train[589824:590024]", "train[663552:]", (64, 64))
_NORB = ("smallnorb:2", _T, "test[:200]", "test[50%:]", (96, 96))
_CLEVR = ("clevr:3", _T, "train[63000:63200]", "validation", (480, 320))
_RETINA = "diabetic_retinopathy_detection/btgraham-300:3"

_VTAB = (
    Task("caltech101", _N, 102, "caltech101:3", _T, "train[2754:2954]", "test", (300, 200)),
    Task("cifar100", _N, 100, "cifar100:3", _T, "train[45000:45200]", "test", (32, 32)),
    Task("dtd", _N, 47, "dtd:3", _T, _V, "test", (500, 450)),
    Task("flowers102", _N, 102, "oxford_flowers102:2", _T, _V, "test", (600, 500)),
    Task("pets", _N, 37, "oxford_iiit_pet:3", _T, "train[2944:3144]", "test", (450, 400)),
    Task("sun397", _N, 397, "sun397/tfds:4", _T, _V, "test", (500, 400)),
    Task("svhn", _N, 10, "svhn_cropped:3", _T, "train[65931:66131]", "test", (32, 32)),
    Task("patch_camelyon", _SP, 2, "patch_camelyon:2", _T, _V, "test", (96, 96)),
    Task(
        *("eurosat", _SP, 10, "eurosat/rgb:2", _T, "train[16200:16400]", "train[21600:]", (64, 64))
    ),
    Task(
        *("resisc45", _SP, 45, "resisc45:3", _T, "train[18900:19100]", "train[25200:]", (256, 256))
    ),
    Task("diabetic_retinopathy", _SP, 5, _RETINA, _T, _V, "test", (300, 300)),
    Task("clevr_count", _ST, 8, *_CLEVR, crop=False, labels=_COUNT, number="objects"),
    Task(
        *("clevr_distance", _ST, 6, *_CLEVR),
        crop=False,
        labels=_CLOSEST,
        number="distance of the nearest object",
    ),
    Task("dmlab", _ST, 6, "dmlab:2.0.1", _T, _V, "test", (480, 360), crop=False),
    Task(
        *("kitti_distance", _ST, 4, "kitti:3.1.0", _T, _V, "test", (1224, 370)),
        crop=False,
        labels=_VEHICLE,
        number="metres to the nearest vehicle, 1000 for none",
    ),
    Task(
        *("dsprites_x", _ST, 16, *_DSPRITES),
        crop=False,
        flip=False,
        labels=_X,
        number="label_x_position",
    ),
    Task(
        *("dsprites_orientation", _ST, 16, *_DSPRITES),
        flip=False,
        labels=_ORIENTATION,
        number="label_orientation",
    ),
    Task("smallnorb_azimuth", _ST, 18, *_NORB, flip=False),
    Task("smallnorb_elevation", _ST, 9, *_NORB),
)

_ALL = ("train", "", "test")

_CIFAR = {"train": 50_000, "test": 10_000}
_AVG5 = (
    Task(
        *("imagenet", "", 1000, "imagenet2012", "train", "", "validation", (500, 375)),
        recipe="finetune_imagenet",
        images={"train": 1_281_167, "test": 50_000},
    ),
    Task(*("cifar10", "", 10, "cifar10", *_ALL, (32, 32)), recipe="finetune_cifar", images=_CIFAR),
    Task(
        *("cifar100", "", 100, "cifar100", *_ALL, (32, 32)), recipe="finetune_cifar", images=_CIFAR
    ),
    Task(
        *("pets", "", 37, "oxford_iiit_pet", *_ALL, (450, 400)),
        recipe="finetune_pets",
        images={"train": 3_680, "test": 3_669},
    ),
    Task(
        *("flowers102", "", 102, "oxford_flowers102", "train, validation", "", "test", (600, 500)),
        recipe="finetune_flowers",
        images={"train": 2_040, "test": 6_149},
    ),
)

VTAB: dict[str, Task] = {task.name: task for task in _VTAB}
AVG5: dict[str, Task] = {task.name: task for task in _AVG5}


def list_tasks() -> list[str]:
    """Returns the lines of `mixer vtab --list`: what each task is, and what is expected for it."""
    head = ["task", "group", "classes", "pixels", "cut", "mirrored", "to learn, choose, measure"]
    rows = [
        [
            *(task.name, task.group, str(task.num_classes), str(task.image_size)),
            *("yes" if each else "no" for each in (task.crop, task.flip)),
            f"{task.tfds}  {task.train}, {task.validation}, {task.test}",
        ]
        for task in VTAB.values()
    ]
    width = max(len(row[-1]) for row in [head, *rows])
    padded = [[*row[:-1], row[-1].ljust(width)] for row in [head, *rows]]  # the last one left
    lines = table(padded[0], padded[1:], left=2)
    lines += ["", "Labels that are made from numbers; the classes themselves do as well:"]
    for task in VTAB.values():
        if task.labels is not None:
            lines.append(f"  {task.name:<21} {task.number}: {task.labels.describe()}")
    return [
        *lines,
        "",
        "Give each task's data as --task NAME=SOURCE or in a file, --tasks tasks.json:",
        '  {"cifar100": "hf:owner/name#label=fine_label", "flowers102": "FOLDER"}',
        "A SOURCE is what --data of the verb train reads, with a train and a test split. One with",
        "at most 1,000 training images is taken as it is; of others the index ranges above where",
        "they fit, else the first 800 and the next 200. tfds stores images in an order of its own,",
        "and only in that order they are exactly VTAB-1k's.",
    ]
