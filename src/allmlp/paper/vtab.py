"""VTAB-1k: the 19 tasks of Zhai et al. 2019 as data, and its two official protocols.

  paper         Google's ViT and Mixer: 2,500 steps of 512 images, cosine decay from the best of
                three learning rates after 200 steps of warm-up, clipped at norm 1, random crop and
                flip if the task allows them, 224 or 448 pixels by task, three seeds
  lightweight   task_adaptation: 1,000 steps of 64 images, learning rate 0.01 divided by 10 after
                steps 300, 600 and 900, 80 steps of warm-up, no clipping or augmentation, 224 pixels
Both: SGD with momentum 0.9, a new zero head, images squashed to the model's size; 800 images to
train and 200 to choose the learning rate, then all 1,000. The score is the mean task accuracy.

The index ranges are those of task_adaptation, in tfds order. Crop and flip follow appendix F of Big
Transfer (Kolesnikov et al. 2020), as in Google's ViT and Mixer: neither where it would change the
answer. The paper fine-tunes Mixers at 224 pixels on data sets of small images and at 448 on large
ones. Small is as in the BiT-HyperRule, below 96 x 96 pixels, so that Patch Camelyon and smallNORB,
with exactly 96 x 96, are large.
"""

from __future__ import annotations

from typing import Any

from allmlp.data.sources.subset_file import LabelRule
from allmlp.errors import UserError
from allmlp.options import make
from allmlp.paper.options import VtabOptions
from allmlp.paper.study import formatted
from allmlp.paper.suite import Suite, SuiteResult, Task, plan_1k, run_suite
from allmlp.training.config import TrainConfig
from allmlp.training.recipes import LEARNING_RATES, recipe

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


def vtab(
    checkpoint: str | None = None,
    options: VtabOptions | None = None,
    *,
    quiet: bool = False,
    **fields: Any,
) -> SuiteResult | None:
    """Fine-tunes a checkpoint on tasks of VTAB-1k, or resumes; None if it only lists them."""
    options = make(VtabOptions, options, fields)
    if options.list_tasks:
        return None
    if checkpoint is None:
        fix = "mixer paper vtab CHECKPOINT --task NAME=SOURCE --output FOLDER"
        raise UserError("no checkpoint is named", fix=fix, code="missing")
    is_paper = options.protocol == "paper"
    suite = Suite(
        kind="vtab",
        known=VTAB,
        protocol=f"VTAB-1k, protocol {options.protocol}",
        config=_paper if is_paper else _lightweight,
        rates=lambda _: LEARNING_RATES["finetune_vtab"] if is_paper else (0.01,),
        seeds=(0, 1, 2) if is_paper else (0,),
        plan=plan_1k,
    )
    return run_suite(suite, checkpoint, options, quiet=quiet)


def _paper(task: Task) -> TrainConfig:
    values = {
        "augment.crop": "random" if task.crop else "none",
        "augment.flip": task.flip,
        "model.image_size": task.image_size,
    }
    return recipe("finetune_vtab").with_values(values)


def _lightweight(_: Task) -> TrainConfig:
    values = {
        "steps": 1000,
        "batch_size": 64,
        "evaluate_every": 200,
        "model.image_size": 224,
        "optimizer.learning_rate": 0.01,
        "optimizer.schedule": "steps",
        "optimizer.decay_at": (300.0, 600.0, 900.0),
        "optimizer.warmup": 80.0,
        "optimizer.clip_norm": 0.0,
    }
    return recipe("finetune_vtab").with_values(values)


def show(result: SuiteResult | None, _: VtabOptions) -> None:
    """Prints the list of tasks, if requested; a suite has already printed its result."""
    if result is None:
        print("\n".join(task_lines()))


def task_lines() -> list[str]:
    """Returns the output of `mixer paper vtab --list`."""
    columns = {
        "task": "{name}",
        "group": "{group}",
        "classes": "{num_classes}",
        "pixels": "{image_size}",
        "crop": "{crop}",
        "flip": "{flip}",
        "train": "{parts[0]}",
        "choose": "{parts[1]}",
        "test": "{parts[2]}",
        "tfds": "{tfds}",
    }
    lines = formatted(columns, map(vars, VTAB.values()))
    lines += ["", "Labels that are made from numbers; the classes themselves will do as well:"]
    for task in VTAB.values():
        if task.labels is not None:
            lines.append(f"  {task.name:<21} {task.number}: {task.labels.describe()}")
    lines += ["", "Give the data of a task as --task NAME=SOURCE or in a file, --tasks tasks.json."]
    return lines
