"""The command line: what each subcommand writes, and the one line users get for what they can mend."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_model

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.cli.main import COMMANDS, main
from ncsr_fast.data import read_image
from ncsr_fast.training import TrainingOutOfMemory, TrainingStopped


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny model."""
    return str(tiny_model(dtype=torch.float32).save_pretrained(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    """Its weights would be a download."""
    monkeypatch.setitem(sys.modules, "lpips", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  ncsr-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("doctor",)])
def test_examples_parse(command):
    """The command line of every example is one the parser accepts."""
    from ncsr_fast.cli.main import build_parser

    line = next(
        line for line in importlib.import_module(f"ncsr_fast.cli.{command}").EXAMPLE.splitlines() if "ncsr-fast" in line
    )
    build_parser().parse_args(line.split()[1:])


def test_entry_point(tmp_path):
    command = [sys.executable, "-m", "ncsr_fast.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)  # not in the checkout
    assert done.stdout.startswith("ncsr-fast 0.")


@pytest.mark.parametrize("names, expected", [("ntire", "00000{}_sample0000{}.png"), ("source", None)])
def test_sample_a_folder(model, photos, tmp_path, names, expected):
    out = tmp_path / "out"
    assert main(["sample", str(photos), "--out", str(out), "--model", model, "--n", "2", "--names", names]) == 0
    if expected:
        wanted = {expected.format(i, k) for i in range(3) for k in range(2)}
    else:
        wanted = {f"{stem}_sample0000{k}.png" for stem in ("a", "b", "nested/c") for k in range(2)}
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == wanted
    assert all(read_image(path).shape == (3, 384, 480) for path in out.rglob("*.png"))


def test_sample_one_odd_image_is_the_model(model, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    arguments = [
        "sample",
        str(tmp_path / "x.png"),
        "--out",
        str(tmp_path),
        "--model",
        model,
        "--n",
        "1",
        "--seed",
        "3",
        "--names",
        "source",
    ]
    assert main([*arguments, "--temperature", "0.5", "--device", "cpu"]) == 0
    with torch.no_grad():
        lr = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
        expected = NCSR.from_pretrained(model).sample(lr, 1, 0.5, torch.Generator().manual_seed(3))[0, 0]
    assert torch.equal(read_image(tmp_path / "x_sample00000.png"), expected.mul(255).round().to(torch.uint8))


def test_sample_goes_on_after_a_broken_file_and_reports_it(model, photos, tmp_path, capsys):
    (photos / "aa.png").write_text("broken")
    assert main(["sample", str(photos), "--out", str(tmp_path / "out"), "--model", model, "--n", "1"]) == 1
    assert "cannot read image" in capsys.readouterr().err
    # numbers are places in the sorted input, so a broken file leaves a gap and shifts nothing
    assert sorted(p.name[:6] for p in (tmp_path / "out").iterdir()) == ["000000", "000002", "000003"]


def test_sample_reports_samples_that_are_not_finite(photos, tmp_path, capsys):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.levels[0].actnorm_logs.fill_(-60)  # decoding multiplies by exp(60) a step
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "sample",
        str(photos / "a.png"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "model"),
        "--n",
        "2",
    ]
    with pytest.warns(RuntimeWarning, match="2 of 2 samples.*level 1, step 0"):
        assert main(arguments) == 1
    assert "2 of 2 samples of" in capsys.readouterr().err


def test_train_and_use(photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--images", str(photos), "--run", str(run), "--preset", "ncsr-compact-x4", "--crop", "32"]
    arguments += ["--batch", "1", "--workers", "0", "--encoder-steps", "1", "--seed", "3", "--device", "cpu"]
    assert main([*arguments, "--steps", "1"]) == 0
    settings = json.loads((run / "settings.json").read_text())
    assert settings["max_std"] == 0.05 and settings["batch"] == 1 and settings["seed"] == 3 and settings["steps"] == 1
    assert main([*arguments, "--steps", "2"]) == 1
    assert "steps (was 1, now 2)" in capsys.readouterr().err
    assert main(["sample", str(photos / "a.png"), "--out", str(tmp_path), "--model", str(run / "model"), "--n", "1"]) == 0


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What `train` was called with, in place of training; its "raises" is raised."""
    import ncsr_fast.training

    monkeypatch.chdir(tmp_path)
    call = {}

    def train(settings, folder, device, report):
        call.update(settings=settings, run=folder, device=device, report=report)
        if "raises" in call:
            raise call["raises"]

    monkeypatch.setattr(ncsr_fast.training, "train", train)
    return call


def test_train_reads_flags_and_a_yaml(trained, tmp_path, capsys):
    (tmp_path / "mine.yml").write_text("preset: ncsr-compact-x4\nimages: [a, b]\nlr: 1e-3\nbatch: 3\nvariant: std\n")
    flags = ["--batch", "2", "--max_std", "0.01", "--l1-weight", "100", "--milestones", "0.5", "0.9", "--flip", "false"]
    flags += ["--tensorboard", "--graph", "none", "--model", "steps=2", "stacked_blocks=0,1", "--model", "blocks=2"]
    assert main(["train", "mine.yml", *flags, "--device", "cpu"]) == 0
    settings = trained["settings"]
    assert trained["run"] == "runs/mine" and trained["device"] == "cpu"
    assert settings.images == ("a", "b") and (settings.lr, settings.batch) == (1e-3, 2)
    assert (settings.max_std, settings.l1_weight, settings.milestones) == (0.01, 100, (0.5, 0.9))
    assert settings.flip is False and settings.tensorboard is True and settings.graph is None
    model = settings.model
    assert (model.steps, model.stacked_blocks, model.blocks, model.noise_channels) == (2, (0, 1), 2, 1)
    assert capsys.readouterr().out == "the model is in runs/mine/model\n" and not (tmp_path / "runs").exists()


def test_train_has_a_flag_for_every_setting(trained):
    """Each of them, given as text, arrives; so --help need not be tried by hand when a setting is added."""
    from ncsr_fast.training.settings import TrainSettings

    values = TrainSettings(NCSRConfig.preset("ncsr-compact-x4"), ("x",), validation="v", start_from="s", crop=48).to_dict()
    del values["model"], values["lr_images"]
    values |= {"validation_lr": "l", "encoder_weights": "e", "graph": False, "unfrozen_lr": 0.5, "seed": 9, "keep": 7}
    arguments = ["train", "--run", "r"]
    for name, value in values.items():
        arguments += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    assert main([*arguments, "--lr-images", "lr"]) == 0
    arrived = trained["settings"].to_dict()
    assert {name: arrived[name] for name in values} == values and arrived["lr_images"] == ["lr"]


def test_train_help_explains_every_setting(capsys):
    from ncsr_fast.training.settings import TrainSettings

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert not set(TrainSettings.__dataclass_fields__) - words


PUBLISHED = """\
name: theirs
scale: 4
mode: softflow
std: 0.05
datasets: {train: {mode: LRHR_IMG, dataroot_GT: hr, batch_size: 2, GT_size: 32}}
network_G:
  which_model_G: NCSRNet
  train_RRDB_delay: 0.5
  flow: {K: 2, L: 3, S: [0, 2, 2], coupling: CondAffineSeparatedAndCond, fea_up0: true, split: {enable: true},
         stackRRDB: {blocks: [1], concat: true}}
train: {lr_G: 0.0002, lr_scheme: MultiStepLR, lr_gamma: 0.5, niter: 10}
"""


@pytest.mark.parametrize("option", ([], ["-opt"]))
@pytest.mark.parametrize("rank", ("0", "1"))
def test_train_reads_a_published_yaml(option, rank, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "4x.yml").write_text(PUBLISHED)
    assert main(["train", *option, "4x.yml", "--lr", "1e-3"]) == 0
    assert trained["run"] == "runs/theirs" and trained["device"] == "auto"
    assert (trained["settings"].lr, trained["settings"].model.steps) == (1e-3, 2)
    out, err = capsys.readouterr()
    assert not (tmp_path / "runs").exists(), "written by train, once it has found nothing wrong"
    if rank == "1":  # torchrun's first process says it for all
        assert not out and not err
    else:
        assert "network_G.train_RRDB_delay = 0.5 is ignored: " in err and "\n".join(trained["report"]) + "\n" == err


@pytest.mark.parametrize("number, status", [(15, 143), (2, 130)])
def test_train_stopped_by_a_signal(trained, capsys, number, status):
    trained["raises"] = TrainingStopped("stopped at step 3; the same command resumes", number)
    assert main(["train", "--images", "a", "--run", "r"]) == status
    assert capsys.readouterr() == ("", "ncsr-fast train: stopped at step 3; the same command resumes\n")


def test_train_out_of_memory(trained, capsys):
    trained["raises"] = TrainingOutOfMemory("out of memory: try --batch 3")
    assert main(["train", "--images", "a", "--run", "r"]) == 1
    assert capsys.readouterr().err == "ncsr-fast train: out of memory: try --batch 3\n"


def test_train_estimates_and_stops(trained, capsys, monkeypatch):
    memory = types.ModuleType("ncsr_fast.training.memory")
    memory.estimate = lambda settings: f"{settings.batch} crops need a lot"
    monkeypatch.setitem(sys.modules, "ncsr_fast.training.memory", memory)
    assert main(["train", "--images", "a", "--estimate", "--batch", "7"]) == 0
    assert capsys.readouterr().out == "7 crops need a lot\n" and not trained


def test_evaluate(model, photos, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    arguments = ["evaluate", str(photos), "--model", model, "--n", "2", "--limit", "2", "--json", str(scores)]
    assert main([*arguments, "--temperatures", "0", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "LR-PSNR" in out and "without LPIPS: LPIPS needs the lpips package" in err
    result = json.loads(scores.read_text())
    assert result["files"] == ["a.png", "b.png"]
    by_method = {row["method"]: row for row in result["scores"]}
    assert list(by_method) == ["bicubic", "temperature 0", "temperature 0.5"]
    for row in by_method.values():
        assert len(row["images"]["psnr"]) == 2 and row["means"]["psnr"] == pytest.approx(sum(row["images"]["psnr"]) / 2)
        assert row["means"]["lr_psnr_worst"] <= row["means"]["lr_psnr"]
    assert by_method["temperature 0"]["means"]["diversity"] == 0 < by_method["temperature 0.5"]["means"]["diversity"]
    assert by_method["bicubic"]["means"]["psnr"] > 30, "smooth pictures"


def test_evaluate_with_given_lr_images_is_evaluate_with_the_same_lr(model, photos, tmp_path):
    from ncsr_fast.data import degrade, list_images, write_image

    for path in list_images(photos):
        write_image(tmp_path / "lr" / path.relative_to(photos), degrade(read_image(path), 4))
    results = []
    for extra in ([], ["--lr-images", str(tmp_path / "lr")]):
        scores = tmp_path / f"{len(extra)}.json"
        assert main(["evaluate", str(photos), "--model", model, "--temperatures", "0", "--json", str(scores), *extra]) == 0
        results.append(
            [{k: v for k, v in row["images"].items() if k != "seconds"} for row in json.loads(scores.read_text())["scores"]]
        )
    assert results[0] == results[1]


def test_demo(model, tmp_path, capsys):
    assert main(["demo", "--model", model, "--out", str(tmp_path), "--n", "3"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("astronaut", "chelsea", "coffee", "LR-PSNR", "diversity", "s/sample"))
    sheet = read_image(tmp_path / "contact_sheet.png")
    assert sheet.shape[2] > 8 * 240 and sheet.shape[1] > 3 * 240
    assert len(list(tmp_path.glob("*_sample*.png"))) == 9


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in (
        "python",
        torch.__version__,
        "pydantic",
        "tensorboard",
        "onnxruntime",
        "huggingface-hub",
        "C++ compiler",
        "actnorm_invconv",
        "native",
        "triton",
        "available: ",
    ):
        assert text in out


def test_convert_there_and_back(tmp_path, capsys):
    published = tiny_model(dtype=torch.float32).published_state_dict()
    torch.save({"params": {f"module.{name}": value for name, value in published.items()}}, tmp_path / "net.pth")
    (tmp_path / "options.json").write_text(json.dumps(tiny_model().config.to_dict()))
    there = ["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model"), "--report", str(tmp_path / "report.txt")]
    assert main(there) == 1
    assert not (tmp_path / "model").exists() and not (tmp_path / "report.txt").exists()
    assert main([*there, "--options", str(tmp_path / "options.json")]) == 0
    assert "NCSR, noise-conditional, ×4, 2 blocks, 1 steps a level: 0 tensors of the same name" in capsys.readouterr().out
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert len(lines) == len(published)
    assert "params/module.flowUpsamplerNet.layers.1.invconv.weight → levels.0.invconv[0]" in lines
    assert "params/module.flowUpsamplerNet.f.0.bias → (dropped)" in lines
    assert main(["convert", str(tmp_path / "model"), "--out", str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again) == list(published)
    used = [name for name in again if not name.startswith("flowUpsamplerNet.f.") and "layers.2.affine.fAffine_std" not in name]
    assert all(torch.equal(again[name], published[name]) for name in used)


def test_convert_names_every_tensor_that_does_not_fit(tmp_path, capsys):
    state = NCSR(NCSRConfig.preset("ncsr-compact-x4")).published_state_dict()
    gone = [name for name in state if name.endswith("fFeatures.0.weight")]
    assert len(gone) == 12, "more than an error message lists"
    state = {name: value for name, value in state.items() if name not in gone} | {"extra": torch.zeros(2)}
    state["RRDB.conv_first.bias"] = torch.zeros(31)
    torch.save(state, tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model")]) == 1
    assert not (tmp_path / "model").exists()
    err = capsys.readouterr().err
    assert all(f"\n  {name}\n" in err for name in (*gone, "extra", "RRDB.conv_first.bias (31,), expected (32,)"))


def test_convert_reads_a_published_yaml(tmp_path, capsys):
    (tmp_path / "4x.yml").write_text(PUBLISHED.replace("NCSRNet", "NCSRNet\n  nb: 2\n  nf: 8\n  gc: 4"))
    shape = {"channels": 8, "growth": 4, "blocks": 2, "stacked_blocks": (1,), "steps": 2, "transition_steps": 0}
    config = NCSRConfig(**shape, noise_channels=3, noise_steps=(0, 2, 2))
    torch.save(NCSR(config).published_state_dict(), tmp_path / "net.pth")
    arguments = ["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model"), "--options"]
    assert main([*arguments, str(tmp_path / "4x.yml")]) == 0
    assert NCSR.from_pretrained(tmp_path / "model").config == config
    (tmp_path / "4x.yml").write_text("scale: [")
    assert main([*arguments, str(tmp_path / "4x.yml")]) == 1
    err = capsys.readouterr().err
    assert "4x.yml' describes no model: " in err and err.count("\n") == 1


def test_export(model, tmp_path, capsys):
    assert main(["export", model, "--out", str(tmp_path / "x.onnx"), "--deterministic"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x.onnx: NCSR, noise-conditional, ×4, .*, largest difference to the model \d\.\de-0[5-9]", out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


FAILURES = {
    "no-model": (["sample", "{photos}", "--out", "{out}", "--model", "nowhere"], "no model at 'nowhere'; shipped models: "),
    "no-input": (["sample", "{out}/nothing", "--out", "{out}", "--model", "{model}"], "no file or folder"),
    "empty": (["evaluate", "{empty}", "--model", "{model}"], "holds no image"),
    "empty-train": (["train", "--images", "{empty}", "--run", "{out}"], "holds no image"),
    "few": (["demo", "--n", "2", "--model", "{model}"], "--n must be at least 3, not 2"),
    "device": (
        ["sample", "{photos}", "--out", "{out}", "--model", "{model}", "--device", "gpu"],
        "no device 'gpu': use cpu or cuda",
    ),
    "crop": (
        ["train", "--images", "{photos}", "--run", "{out}", "--crop", "90"],
        "crop must be a positive multiple of 2·scale = 8, not 90",
    ),
    "folder-for-yaml": (
        ["train", "{photos}", "--run", "{out}"],
        "should be a YAML file, not a folder; folders of images go in",
    ),
    "two-yamls": (["train", "{out}/a.yml", "-opt", "{out}/b.yml"], "b.yml' is a second YAML beside "),
    "convert-nothing": (["convert", "{out}/no.pth", "--out", "{out}"], "no model at "),
    "convert-itself": (["convert", "{model}", "--out", "{model}"], "out is the source itself, "),
    "options": (["convert", "{model}", "--out", "{out}", "--options", "{out}.yml"], "No such file"),
    "export-nothing": (["export", "nowhere", "--out", "{out}/x.onnx"], "no model at 'nowhere'; shipped models: "),
    "no-run": (["train", "--images", "{photos}"], "--run: should be the folder of the run, which only a YAML can leave out"),
    "no-images": (["train", "--run", "{out}"], "images is missing"),
    "wrong-type": (["train", "--images", "{photos}", "--run", "{out}", "--lr", "fast"], "lr: should be a number, not 'fast'"),
    "pair": (
        ["train", "--images", "{photos}", "--run", "{out}", "--model", "steps"],
        "--model: should be KEY=VALUE, not 'steps'",
    ),
    "train-device": (
        ["train", "--images", "{photos}", "--run", "{out}", "--device", "gpu"],
        "no device 'gpu': use cpu or cuda",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(name, model, photos, tmp_path, capsys):
    arguments, message = FAILURES[name]
    (tmp_path / "empty").mkdir()
    places = {"photos": photos, "out": tmp_path / "out", "model": model, "empty": tmp_path / "empty"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"ncsr-fast {arguments[0]}: ") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_it(model, photos, tmp_path, capsys):
    assert main(["sample", str(photos), "--out", str(tmp_path), "--model", model, "--device", "cuda"]) == 1
    reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no CUDA device"
    assert f"device 'cuda' was asked for, but {reason}; use --device cpu" in capsys.readouterr().err
