"""The commands by name."""

from __future__ import annotations

from allmlp.cli.table import Command

# Name and the line in `mixer --help`; then options, function and positional arguments.
_TABLE = """
models: List architectures and published weights, or describe a weights file.
    cli.models.ModelsOptions cli.models.models
train: Train a model from random weights.
    cli.training.TrainOptions cli.training.train_command recipe?
finetune: Fine-tune a checkpoint on your own images, at any image size.
    cli.training.FinetuneOptions cli.training.finetune_command weights
evaluate: Evaluate a model on labelled images.
    evaluation.options.EvaluateOptions evaluate.command model
calibrate: Fit probabilities on held-out images; choose when to answer "unsure".
    evaluation.options.CalibrateOptions calibrate.command weights output
few-shot: Measure few-shot accuracy of a model's features.
    evaluation.options.FewShotOptions evaluation.few_shot.command weights
predict: Classify images: files, folders, patterns, URLs or a data source.
    deploy.options.PredictOptions deploy.predict.command model images*
inspect: Show what the token-mixing units have learned, and what an image activates.
    evaluation.options.InspectOptions inspection.inspect.inspect weights
benchmark: Measure throughput, latency, memory and the fraction of the machine's peak.
    evaluation.options.BenchmarkOptions benchmark.command models*?
convert: Convert weights to another format, image size or number of classes.
    weights.convert.ConvertOptions weights.convert.convert weights output
export: Export to ONNX, OpenVINO or torch.export, and validate the file.
    deploy.options.ExportOptions deploy.export.command weights
serve: Serve a model over HTTP, with a local web page.
    deploy.options.ServeOptions deploy.serve.command model
push: Upload a model and its card to the Hugging Face hub.
    deploy.options.PushOptions deploy.push.push weights repo
env: Report versions, hardware and installed extras, for example for a bug report.
    cli.models.EnvOptions cli.models.env
paper vtab: Fine-tune a checkpoint on the 19 tasks of VTAB-1k.
    paper.options.VtabOptions paper.suites.vtab weights?
paper avg5: Fine-tune a checkpoint on ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers.
    paper.options.Avg5Options paper.suites.avg5 weights
paper data-scale: Figure 2, right: train on growing fractions of the data, for equally many steps.
    paper.options.DataScaleOptions paper.studies.data_scale
paper permutation: Figure 4: train on permuted pixels.
    paper.options.PermutationOptions paper.studies.permutation
paper ablations: Appendix A.1: compare the token-mixing variants.
    paper.options.AblationsOptions paper.studies.ablations
paper tables: The paper's Tables 1, 2 and 3 and figures, beside your own measurements.
    paper.options.TablesOptions paper.tables.tables runs*
data check: Check data before training: contents, damaged images and duplicates.
    cli.data.CheckOptions cli.data.check data
data mistakes: Find images whose label is probably wrong.
    evaluation.options.LabelMistakesOptions label_mistakes.command weights
data pack: Pack data into Arrow files: few files to copy, fast random access.
    cli.data.PackOptions cli.data.pack data output
"""
_LINES = _TABLE.strip().splitlines()
VERBS = {
    name: Command(words.strip(), summary)
    for (name, _, summary), words in zip(
        (line.partition(": ") for line in _LINES[::2]), _LINES[1::2], strict=True
    )
}

# Help for groups of two-word commands, by the first word.
GROUPS = {
    "paper": "The paper's experiments: vtab, avg5, data-scale, permutation, ablations, tables.",
    "data": "Check data before training (data check, data mistakes), and pack it (data pack).",
}
