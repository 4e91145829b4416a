"""The command as a user types it: help, tables, exit codes, one message for each mistake."""

import subprocess
import sys

import pytest
from rich.cells import cell_len

import allmlp as am
from allmlp.cli.verbs import VERBS
from allmlp.console import table
from conftest import mixer, ran, refused


def test_help_imports_no_torch():
    code = (
        "import sys, allmlp; dir(allmlp); assert 'torch' not in sys.modules\n"
        "from allmlp.cli.main import main\n"
        "from allmlp.cli.verbs import VERBS\n"
        "for line in ('', '--help', *(f'{verb} --help' for verb in VERBS)):\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: assert not end.code, (line, end.code)\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: mixer") == len(VERBS) + 2


def test_packing_imports_no_sympy():
    """It takes 0.2 s, and torch imports it for some operations on the meta device."""
    code = "import sys; from allmlp.models.inference import can_pack as check; check('float32'); "
    code += "sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "unknown command 'trian'\nto fix: Did you mean train? Known: models, train, "),
        ("data chek x", "Did you mean check? Known: check, mistakes, pack"),
        ("version", "Did you mean --version?"),
        ("train --epoch 3", "--epochs"),
        ("train --epochs many", "--epochs takes a whole number, got 'many'"),
    ],
)
def test_typos(capsys, line, words):
    code, out, err = mixer(capsys, *line.split())
    assert (code, words in out + err) == (2, True)


def test_models(capsys):
    out, _ = ran(capsys, "models")
    lines = out.splitlines()
    assert lines[0].split() == ["name", "pixels", "parameters", "with", "head", "GFLOPs", "tokens"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2 : 2 + len(am.list_models())]}
    assert list(rows) == am.list_models()
    assert rows["mixer_b16"] == ["224x224", "59,111,472", "59,880,472", "25.20", "196"]
    stages = ["3,136", "to", "49"]
    assert rows["cycle_mlp_b1"] == ["224x224", "14,642,400", "15,155,400", "4.24", *stages]
    assert rows["vip_s7"][3:] == ["13.80", "1,024", "to", "256"]


def test_models_at_another_size(capsys):
    out, _ = ran(capsys, "models", "--image-size", "64x96")
    assert "64x96" in out
    assert "left out: cannot build mixer_h14: image size 64x96 is not divisible" in out
    code, _, err = mixer(capsys, "models", "--image-size", "3")
    assert code == 2
    assert "image size 3x3 is not divisible by the patch size" in err


def test_wide_letters_take_two_columns():
    lines = table(["类", "images"], [["cat", "9"], ["ねこ", "10"], ["고양이", "1,000"]])
    assert {cell_len(line) for line in lines} == {len("고양이") * 2 + 2 + len("images")}
    assert lines[3] == "ねこ        10"


FINETUNE = "finetune RUN --data ANIMALS"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --data nowhere", "no such data: 'nowhere'"),
        ("train scratch", "the recipe needs data"),
        ("evaluate nowhere --data digits", "no such model: 'nowhere'"),
        ("evaluate RUN --data ANIMALS", "unknown to the model: 'ant', 'bee', 'cat'"),
        ("evaluate . --data digits", "the folder has no weights"),
        ("evaluate RUN --data digits --batch-size 0", "batch_size must be at"),
        ("evaluate RUN --data digits --output file/x", "folder cannot be written to"),
        ("evaluate RUN --data digits --output file", "the output is a file, it must be a folder"),
        ("evaluate RUN --data digits --crop 0", "crop must be greater than 0, got 0.0"),
        ("evaluate RUN --data digits --crop 0.9 --resize squash", "crop 0.9 has no effect"),
        ("evaluate RUN --data digits --real file", "the ReaL labels are not JSON"),
        ("few-shot RUN --data digits --output figures.csv", "not a .json file: 'figures.csv'"),
        ("few-shot RUN --data digits:train", "train only"),
        ("evaluate RUN --data digits:tets", "unknown split 'tets'"),
        ("data check ANIMALS --duplicates off --exclude list.txt", "exclude"),
        ("data check ANIMALS --output file", "file"),
        ("data check ANIMALS --exclude none/list.txt", "none"),
        ("predict RUN", "no images given"),
        ("predict RUN digits:test --features", "features are written to a file"),
        ("models --set token_groups", "KEY=VALUE"),
        ("models --weights --set num_blocks=2", "weights and settings exclude each other"),
        ("benchmark mixer_b16.i1k --set num_blocks=2", "its weights say what it is"),
        ("benchmark --recipe digits --set num_blocks=2", "recipe and settings exclude each other"),
        ("train --config CONFIG --resume RUN", "config and resume exclude each other"),
        ("finetune nowhere --data ANIMALS", "no such model: 'nowhere'"),
        ("finetune mixer_b16 --data ANIMALS", "'mixer_b16' is an architecture and has no weights"),
        ("finetune EMPTY --data ANIMALS", "begins with trained weights, and none are given"),
        (f"{FINETUNE} --recipe finetune_petz", "unknown recipe 'finetune_petz'"),
        (f"{FINETUNE} --grid --learning-rate 1", "learning_rate and grid"),
        (f"{FINETUNE} --resize-weights resample", "resize_weights needs image_size"),
        (f"{FINETUNE} --grid 0", "optimizer.learning_rate must be greater than 0, got 0.0"),
        (f"{FINETUNE} --grid --output file", "the output is a file"),
        (f"{FINETUNE} --grid --output ANIMALS", "the folder holds something else"),
        ("finetune RUN --data VAL", "the data has no train split"),
        (f"{FINETUNE} --set optimizer.warmup=100 --steps 50", "100 steps of warm-up"),
        (f"{FINETUNE} --probe --grid", "probe"),
        (f"{FINETUNE} --seed 0 --seeds 1", "seed and seeds"),
        (f"{FINETUNE} --set model.overrides.patch_size=2", "the weights determine it"),
    ],
)
def test_mistakes(capsys, trained, class_folder, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    names = {"RUN": trained.run_folder, "CONFIG": trained.run_folder / "config.json"}
    names |= {"ANIMALS": class_folder, "VAL": f"{class_folder}:val", "EMPTY": ""}
    err = refused(capsys, tmp_path, *(names.get(word, word) for word in line.split()))
    assert message in err


@pytest.mark.parametrize("flags", [["--debug"], []])
def test_debug_shows_the_traceback(capsys, flags):
    code, out, err = mixer(capsys, "train", "nothing", *flags)
    assert (code, out) == (2, "")
    assert "unknown recipe 'nothing'" in err
    assert ("Traceback" in err) == bool(flags)
