"""The tasks of VTAB-1k and "Avg 5" as data.

The index ranges of VTAB-1k are those of task_adaptation, in tfds order. Crop and flip follow
appendix F of Big Transfer (Kolesnikov et al. 2020): neither where it would change the answer. Small
images, below 96 x 96 pixels (BiT-HyperRule), are brought to 224 pixels, others to 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from allmlp.data.sources.subset_file import LabelRule


@dataclass(frozen=True)
class Task:
    """A task of a suite, with the official sizes and splits of its data."""

    name: str
    num_classes: int
    group: str = ""  # natural, specialised or structured; "" in Avg 5
    tfds: str = ""  # data set name
    parts: tuple[str, ...] = ()  # train, validation (for the rate) and test, in tfds order
    image_size: int = 224
    crop: bool = True  # whether random crops are allowed in training
    flip: bool = True
    labels: LabelRule | None = None  # turns a number into classes
    number: str = ""  # input of the rule
    recipe: str = "finetune_vtab"
    images: Mapping[str, int] = field(default_factory=dict)  # train and test, if all are used


# Name, group, classes, tfds data set, validation and test images (training uses 800 of train),
# typical size; then what training must not do.
_TABLE = """
caltech101            natural      102  caltech101:3          train[2754:2954]      test             300x200
cifar100              natural      100  cifar100:3            train[45000:45200]    test             32x32
dtd                   natural      47   dtd:3                 validation[:200]      test             500x450
flowers102            natural      102  oxford_flowers102:2   validation[:200]      test             600x500
pets                  natural      37   oxford_iiit_pet:3     train[2944:3144]      test             450x400
sun397                natural      397  sun397/tfds:4         validation[:200]      test             500x400
svhn                  natural      10   svhn_cropped:3        train[65931:66131]    test             32x32
patch_camelyon        specialised  2    patch_camelyon:2      validation[:200]      test             96x96
eurosat               specialised  10   eurosat/rgb:2         train[16200:16400]    train[21600:]    64x64
resisc45              specialised  45   resisc45:3            train[18900:19100]    train[25200:]    256x256
diabetic_retinopathy  specialised  5    RETINOPATHY           validation[:200]      test             300x300
clevr_count           structured   8    clevr:3               train[63000:63200]    validation       480x320  no-crop
clevr_distance        structured   6    clevr:3               train[63000:63200]    validation       480x320  no-crop
dmlab                 structured   6    dmlab:2.0.1           validation[:200]      test             480x360  no-crop
kitti_distance        structured   4    kitti:3.1.0           validation[:200]      test             1224x370 no-crop
dsprites_x            structured   16   dsprites:2            train[589824:590024]  train[663552:]   64x64    no-crop no-flip
dsprites_orientation  structured   16   dsprites:2            train[589824:590024]  train[663552:]   64x64    no-flip
smallnorb_azimuth     structured   18   smallnorb:2           test[:200]            test[50%:]       96x96    no-flip
smallnorb_elevation   structured   9    smallnorb:2           test[:200]            test[50%:]       96x96
"""  # noqa: E501
# Task -> the number in its labels, and the rule that turns it into classes.
_LABELS = {
    "clevr_count": ("objects", LabelRule("shift", (3, 8))),
    "clevr_distance": (
        "distance of the nearest object",
        LabelRule("between", (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)),
    ),
    "kitti_distance": (
        "metres to the nearest vehicle, 1000 for none",
        LabelRule("between", (-100.0, 8.0, 20.0, 999.0, 1e9)),
    ),
    "dsprites_x": ("label_x_position", LabelRule("bins", (32, 16))),
    "dsprites_orientation": ("label_orientation", LabelRule("bins", (40, 16))),
}


def _task(line: str) -> Task:
    name, group, classes, tfds, validation, test, pixels, *forbidden = line.split()
    width, height = map(int, pixels.split("x"))
    number, labels = _LABELS.get(name, ("", None))
    return Task(
        name,
        int(classes),
        group=group,
        tfds=tfds.replace("RETINOPATHY", "diabetic_retinopathy_detection/btgraham-300:3"),
        parts=("train[:800]", validation, test),
        image_size=224 if width * height < 96 * 96 else 448,
        crop="no-crop" not in forbidden,
        flip="no-flip" not in forbidden,
        labels=labels,
        number=number,
    )


VTAB: dict[str, Task] = {task.name: task for task in map(_task, _TABLE.strip().splitlines())}

AVG5: dict[str, Task] = {
    name: Task(name, classes, recipe=recipe, images={"train": train, "test": test})
    for name, classes, recipe, train, test in (
        ("imagenet", 1000, "finetune_imagenet", 1_281_167, 50_000),
        ("cifar10", 10, "finetune_cifar", 50_000, 10_000),
        ("cifar100", 100, "finetune_cifar", 50_000, 10_000),
        ("pets", 37, "finetune_pets", 3_680, 3_669),
        ("flowers102", 102, "finetune_flowers", 2_040, 6_149),
    )
}
