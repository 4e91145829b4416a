"""The commands by name."""

from __future__ import annotations

from allmlp.cli.table import Command

# Options, function, line in `mixer --help`, positional arguments.
VERBS = {
    "models": Command(
        "cli.models.ModelsOptions",
        "cli.models.models",
        "List architectures and published weights, or describe a weights file.",
    ),
    "train": Command(
        "cli.training.TrainOptions",
        "cli.training.train_command",
        "Train a model from random weights.",
        "recipe?",
    ),
    "finetune": Command(
        "cli.training.FinetuneOptions",
        "cli.training.finetune_command",
        "Fine-tune a checkpoint on your own images, at any image size.",
        "weights",
    ),
    "evaluate": Command(
        "evaluation.options.EvaluateOptions",
        "evaluate.command",
        "Evaluate a model on labelled images.",
        "model",
    ),
    "calibrate": Command(
        "evaluation.options.CalibrateOptions",
        "calibrate.command",
        'Fit probabilities on held-out images; choose when to answer "unsure".',
        "weights output",
    ),
    "few-shot": Command(
        "evaluation.options.FewShotOptions",
        "evaluation.few_shot.command",
        "Measure few-shot accuracy of a model's features.",
        "weights",
    ),
    "predict": Command(
        "deploy.options.PredictOptions",
        "deploy.predict.command",
        "Classify images: files, folders, patterns, URLs or a data source.",
        "model images*",
    ),
    "inspect": Command(
        "inspection.options.InspectOptions",
        "inspection.inspect.inspect",
        "Show what the token-mixing units have learned, and what an image activates.",
        "weights",
    ),
    "benchmark": Command(
        "evaluation.options.BenchmarkOptions",
        "benchmark.command",
        "Measure throughput, latency, memory and the fraction of the machine's peak.",
        "models*?",
    ),
    "convert": Command(
        "weights.convert.ConvertOptions",
        "weights.convert.convert",
        "Convert weights to another format, image size or number of classes.",
        "weights output",
    ),
    "export": Command(
        "deploy.options.ExportOptions",
        "deploy.export.command",
        "Export to ONNX, OpenVINO or torch.export, and validate the file.",
        "weights",
    ),
    "serve": Command(
        "deploy.options.ServeOptions",
        "deploy.serve.command",
        "Serve a model over HTTP, with a local web page.",
        "model",
    ),
    "push": Command(
        "deploy.options.PushOptions",
        "deploy.push.push",
        "Upload a model and its card to the Hugging Face hub.",
        "weights repo",
    ),
    "env": Command(
        "cli.env.EnvOptions",
        "cli.env.env",
        "Report versions, hardware and installed extras, for example for a bug report.",
    ),
    "paper vtab": Command(
        "paper.options.VtabOptions",
        "paper.vtab.vtab",
        "Fine-tune a checkpoint on the 19 tasks of VTAB-1k.",
        "weights?",
    ),
    "paper avg5": Command(
        "paper.options.Avg5Options",
        "paper.avg5.avg5",
        "Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.",
        "weights",
    ),
    "paper data-scale": Command(
        "paper.options.DataScaleOptions",
        "paper.data_scale.data_scale",
        "Figure 2, right: train on growing fractions of the data, for equally many steps.",
    ),
    "paper permutation": Command(
        "paper.options.PermutationOptions",
        "paper.permutation.permutation",
        "Figure 4: train on permuted pixels.",
    ),
    "paper ablations": Command(
        "paper.options.AblationsOptions",
        "paper.ablations.ablations",
        "Appendix A.1: compare the token-mixing variants.",
    ),
    "paper tables": Command(
        "paper.options.TablesOptions",
        "paper.tables.tables",
        "The paper's Tables 1, 2 and 3 and figures, beside your own measurements.",
        "runs*",
    ),
    "data check": Command(
        "cli.check.CheckOptions",
        "cli.check.check",
        "Check data before training: contents, damaged images and duplicates.",
        "data",
    ),
    "data mistakes": Command(
        "evaluation.options.LabelMistakesOptions",
        "label_mistakes.command",
        "Find images whose label is probably wrong.",
        "weights",
    ),
    "data pack": Command(
        "cli.pack.PackOptions",
        "cli.pack.pack",
        "Pack data into Arrow files: few files to copy, fast random access.",
        "data output",
    ),
    "data index": Command(
        "cli.pack.IndexOptions",
        "cli.pack.index",
        "Index WebDataset tars of other tools, so that they can be read.",
        "folder",
    ),
}

# Help for groups of two-word commands, by the first word.
GROUPS = {
    "paper": "The paper's experiments: vtab, avg5, data-scale, permutation, ablations, tables.",
    "data": "Check data before training (data check, data mistakes), and pack it (data pack).",
}
