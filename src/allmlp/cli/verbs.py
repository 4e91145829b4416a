"""The commands by name."""

from __future__ import annotations

from allmlp.cli.table import Command

# Options, function and positional arguments; the line in `mixer --help`.
VERBS = {
    "models": Command(
        "cli.models.ModelsOptions cli.models.models",
        "List architectures and published weights, or describe a weights file.",
    ),
    "train": Command(
        "cli.training.TrainOptions cli.training.train_command recipe?",
        "Train a model from random weights.",
    ),
    "finetune": Command(
        "cli.training.FinetuneOptions cli.training.finetune_command weights",
        "Fine-tune a checkpoint on your own images, at any image size.",
    ),
    "evaluate": Command(
        "evaluation.options.EvaluateOptions evaluate.command model",
        "Evaluate a model on labelled images.",
    ),
    "calibrate": Command(
        "evaluation.options.CalibrateOptions calibrate.command weights output",
        'Fit probabilities on held-out images; choose when to answer "unsure".',
    ),
    "few-shot": Command(
        "evaluation.options.FewShotOptions evaluation.few_shot.command weights",
        "Measure few-shot accuracy of a model's features.",
    ),
    "predict": Command(
        "deploy.options.PredictOptions deploy.predict.command model images*",
        "Classify images: files, folders, patterns, URLs or a data source.",
    ),
    "inspect": Command(
        "inspection.options.InspectOptions inspection.inspect.inspect weights",
        "Show what the token-mixing units have learned, and what an image activates.",
    ),
    "benchmark": Command(
        "evaluation.options.BenchmarkOptions benchmark.command models*?",
        "Measure throughput, latency, memory and the fraction of the machine's peak.",
    ),
    "convert": Command(
        "weights.convert.ConvertOptions weights.convert.convert weights output",
        "Convert weights to another format, image size or number of classes.",
    ),
    "export": Command(
        "deploy.options.ExportOptions deploy.export.command weights",
        "Export to ONNX, OpenVINO or torch.export, and validate the file.",
    ),
    "serve": Command(
        "deploy.options.ServeOptions deploy.serve.command model",
        "Serve a model over HTTP, with a local web page.",
    ),
    "push": Command(
        "deploy.options.PushOptions deploy.push.push weights repo",
        "Upload a model and its card to the Hugging Face hub.",
    ),
    "env": Command(
        "cli.env.EnvOptions cli.env.env",
        "Report versions, hardware and installed extras, for example for a bug report.",
    ),
    "paper vtab": Command(
        "paper.options.VtabOptions paper.vtab.vtab weights?",
        "Fine-tune a checkpoint on the 19 tasks of VTAB-1k.",
    ),
    "paper avg5": Command(
        "paper.options.Avg5Options paper.avg5.avg5 weights",
        "Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.",
    ),
    "paper data-scale": Command(
        "paper.options.DataScaleOptions paper.data_scale.data_scale",
        "Figure 2, right: train on growing fractions of the data, for equally many steps.",
    ),
    "paper permutation": Command(
        "paper.options.PermutationOptions paper.permutation.permutation",
        "Figure 4: train on permuted pixels.",
    ),
    "paper ablations": Command(
        "paper.options.AblationsOptions paper.ablations.ablations",
        "Appendix A.1: compare the token-mixing variants.",
    ),
    "paper tables": Command(
        "paper.options.TablesOptions paper.tables.tables runs*",
        "The paper's Tables 1, 2 and 3 and figures, beside your own measurements.",
    ),
    "data check": Command(
        "cli.check.CheckOptions cli.check.check data",
        "Check data before training: contents, damaged images and duplicates.",
    ),
    "data mistakes": Command(
        "evaluation.options.LabelMistakesOptions label_mistakes.command weights",
        "Find images whose label is probably wrong.",
    ),
    "data pack": Command(
        "cli.pack.PackOptions cli.pack.pack data output",
        "Pack data into Arrow files: few files to copy, fast random access.",
    ),
}

# Help for groups of two-word commands, by the first word.
GROUPS = {
    "paper": "The paper's experiments: vtab, avg5, data-scale, permutation, ablations, tables.",
    "data": "Check data before training (data check, data mistakes), and pack it (data pack).",
}
