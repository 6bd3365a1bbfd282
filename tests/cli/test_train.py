"""`ncsr-fast train`: how settings arrive, and what is said at the end."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

from ncsr_fast import NCSRConfig
from ncsr_fast.cli.main import main
from ncsr_fast.training import TrainingOutOfMemory, TrainingStopped


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


def test_train_and_use(photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--images", str(photos), "--run", str(run), "--preset", "ncsr-compact-x4", "--crop", "32"]
    arguments += ["--model", "steps=1", "noise_steps=0,1,1", "--validation-images", "1", "--validation-size", "32"]
    arguments += ["--batch", "1", "--workers", "0", "--encoder-steps", "1", "--seed", "3", "--device", "cpu"]
    assert main([*arguments, "--steps", "1"]) == 0
    settings = json.loads((run / "settings.json").read_text())
    assert settings["max_std"] == 0.05 and settings["batch"] == 1 and settings["seed"] == 3 and settings["steps"] == 1
    assert main([*arguments, "--steps", "2"]) == 1
    assert "steps (was 1, now 2)" in capsys.readouterr().err
    assert main(["sample", str(photos / "a.png"), "--out", str(tmp_path), "--model", str(run / "model"), "--n", "1"]) == 0


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


@pytest.mark.parametrize("option", ([], ["-opt"]))
def test_train_expands_the_home_folder(option, trained, tmp_path, monkeypatch):
    """Also where a shell does not, as in --run=~/r."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yml").write_text("preset: ncsr-compact-x4\nimages: [a]\n")
    assert main(["train", *option, "~/mine.yml", "--run=~/r", "--images=~/b"]) == 0
    assert trained["run"] == f"{tmp_path}/r" and trained["settings"].images == (f"{tmp_path}/b",)
    with pytest.raises(SystemExit):
        main(["train", "--run", ""])


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


@pytest.mark.parametrize("option", ([], ["-opt"]))
@pytest.mark.parametrize("rank", ("0", "1"))
def test_train_reads_a_published_yaml(option, rank, trained, published_yaml, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "4x.yml").write_text(published_yaml)
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
