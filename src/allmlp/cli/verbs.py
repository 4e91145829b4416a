"""The verbs of the command, by their names."""

from __future__ import annotations

from typing import Any

from allmlp.cli.table import Command

PAPER = {
    "paper vtab": Command(
        *("paper.vtab", "VtabOptions", "vtab"),
        "Fine-tune a checkpoint on the 19 tasks of VTAB-1k.",
        *("show", ("model?",)),
    ),
    "paper avg5": Command(
        *("paper.avg5", "Avg5Options", "avg5"),
        "Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.",
        positional=("model",),
    ),
    "paper data-scale": Command(
        *("paper.data_scale", "DataScaleOptions", "data_scale"),
        "Figure 2, right: train on growing fractions of the images, equally long.",
    ),
    "paper permutation": Command(
        *("paper.permutation", "PermutationOptions", "permutation"),
        "Figure 4: train on shuffled pixels.",
    ),
    "paper ablations": Command(
        *("paper.ablations", "AblationsOptions", "ablations"),
        "Appendix A.1: the token-mixing variants under one budget.",
    ),
    "paper tables": Command(
        *("paper.tables", "TablesOptions", "tables"),
        "The paper's Tables 1, 2 and 3 and figures with your measurements beside them.",
        *("show", ("runs*",)),
    ),
}

VERBS: dict[str, Any] = {
    "models": Command(
        "cli.models",
        "ModelsOptions",
        "models",
        "List the architectures, the published weights, or what a weights file holds.",
        "show",
    ),
    "train": Command(
        *("cli.training", "TrainOptions", "train_command"),
        "Train a model from random weights.",
        positional=("recipe?",),
    ),
    "finetune": Command(
        *("cli.training", "FinetuneOptions", "finetune_command"),
        "Continue training from a checkpoint on your own images, at any image size.",
        positional=("model",),
    ),
    "evaluate": Command(
        *("evaluate", "EvaluateOptions", "command"),
        "Measure a trained model on labelled images.",
        *("show", ("model",)),
    ),
    "few-shot": Command(
        *("evaluation.few_shot", "FewShotOptions", "command"),
        "Measure how well a model's features serve after a few images per class.",
        *("show", ("model",)),
    ),
    "predict": Command(
        *("deploy.predict", "PredictOptions", "command"),
        "Classify images: files, folders and patterns, or any data source.",
        *("show", ("model", "images*")),
    ),
    "inspect": Command(
        "inspection.inspect",
        "InspectOptions",
        "inspect",
        "Look inside: what the token-mixing units have learned, and what one image excites.",
        "show",
        ("model",),
    ),
    "benchmark": Command(
        *("benchmark", "BenchmarkOptions", "command"),
        "Measure images per second, latency, memory and the fraction of the machine's peak.",
        *("show", ("models*?",)),
    ),
    "convert": Command(
        "weights.convert",
        "ConvertOptions",
        "convert",
        "Write a model in another format, at another image size, or with a new head.",
        "show",
        ("model", "output"),
    ),
    "export": Command(
        *("deploy.export", "ExportOptions", "command"),
        "Write a model as a file that runs without this package, and measure that file.",
        *("show", ("model",)),
    ),
    "serve": Command(
        *("deploy.serve", "ServeOptions", "command"),
        "Show a model on a local web page, and answer programs over HTTP.",
        positional=("model",),
    ),
    **PAPER,
    "data check": Command(
        "cli.check",
        "CheckOptions",
        "check",
        "Look at data before training: what it contains, what is damaged, and duplicates.",
        positional=("data",),
    ),
    "data pack": Command(
        "cli.pack",
        "PackOptions",
        "pack",
        "Write data as Arrow files, which are fast to read in any order and few files to copy.",
        positional=("data", "output"),
    ),
    "data index": Command(
        "cli.pack",
        "IndexOptions",
        "index",
        "Write the index that makes WebDataset tars of another tool a source of data.",
        positional=("folder",),
    ),
}

# What the help says of verbs of two words, by the first.
GROUPS: dict[str, str] = {
    "paper": "The paper's experiments: vtab, avg5, data-scale, permutation, ablations, tables.",
    "data": "Look at data before training (data check), and pack it for fast reading (data pack).",
}
