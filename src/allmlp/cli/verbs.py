"""The commands, by their names."""

from __future__ import annotations

from allmlp.cli.table import Command

VERBS = {
    "models": Command(
        "cli.models.ModelsOptions",
        "cli.models.models",
        "List the architectures, the published weights, or what a weights file holds.",
    ),
    "train": Command(
        *("cli.training.TrainOptions", "cli.training.train_command"),
        *("Train a model from random weights.", "recipe?"),
    ),
    "finetune": Command(
        *("cli.training.FinetuneOptions", "cli.training.finetune_command"),
        *("Continue training from a checkpoint on your own images, at any image size.", "weights"),
    ),
    "evaluate": Command(
        *("evaluate.EvaluateOptions", "evaluate.command"),
        *("Measure a trained model on labelled images.", "model"),
    ),
    "few-shot": Command(
        *("evaluation.few_shot.FewShotOptions", "evaluation.few_shot.command"),
        *("Measure how well a model's features serve after a few images per class.", "weights"),
    ),
    "predict": Command(
        *("deploy.options.PredictOptions", "deploy.predict.command"),
        *("Classify images: files, folders and patterns, or any data source.", "model images*"),
    ),
    "inspect": Command(
        *("inspection.inspect.InspectOptions", "inspection.inspect.inspect"),
        "Look inside: what the token-mixing units have learned, and what one image excites.",
        "weights",
    ),
    "benchmark": Command(
        *("benchmark.BenchmarkOptions", "benchmark.command"),
        "Measure images per second, latency, memory and the fraction of the machine's peak.",
        "models*?",
    ),
    "convert": Command(
        *("weights.convert.ConvertOptions", "weights.convert.convert"),
        "Write a model in another format, at another image size, or with a new head.",
        "weights output",
    ),
    "export": Command(
        *("deploy.options.ExportOptions", "deploy.export.command"),
        "Write a model as a file that runs without this package, and measure that file.",
        "weights",
    ),
    "serve": Command(
        *("deploy.options.ServeOptions", "deploy.serve.command"),
        *("Show a model on a local web page, and answer programs over HTTP.", "model"),
    ),
    "paper vtab": Command(
        *("paper.vtab.VtabOptions", "paper.vtab.vtab"),
        *("Fine-tune a checkpoint on the 19 tasks of VTAB-1k.", "weights?"),
    ),
    "paper avg5": Command(
        *("paper.avg5.Avg5Options", "paper.avg5.avg5"),
        "Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.",
        "weights",
    ),
    "paper data-scale": Command(
        *("paper.data_scale.DataScaleOptions", "paper.data_scale.data_scale"),
        "Figure 2, right: train on growing fractions of the images, equally long.",
    ),
    "paper permutation": Command(
        *("paper.permutation.PermutationOptions", "paper.permutation.permutation"),
        "Figure 4: train on shuffled pixels.",
    ),
    "paper ablations": Command(
        *("paper.ablations.AblationsOptions", "paper.ablations.ablations"),
        "Appendix A.1: the token-mixing variants under one budget.",
    ),
    "paper tables": Command(
        *("paper.tables.TablesOptions", "paper.tables.tables"),
        "The paper's Tables 1, 2 and 3 and figures with your measurements beside them.",
        "runs*",
    ),
    "data check": Command(
        *("cli.check.CheckOptions", "cli.check.check"),
        "Look at data before training: what it contains, what is damaged, and duplicates.",
        "data",
    ),
    "data pack": Command(
        *("cli.pack.PackOptions", "cli.pack.pack"),
        "Write data as Arrow files, which are fast to read in any order and few files to copy.",
        "data output",
    ),
    "data index": Command(
        *("cli.pack.IndexOptions", "cli.pack.index"),
        "Write the index that makes WebDataset tars of another tool a source of data.",
        "folder",
    ),
}

# The help of the commands of two words, by the first.
GROUPS = {
    "paper": "The paper's experiments: vtab, avg5, data-scale, permutation, ablations, tables.",
    "data": "Look at data before training (data check), and pack it for fast reading (data pack).",
}
