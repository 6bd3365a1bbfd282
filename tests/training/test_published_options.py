"""YAML files of the published programs: every key is followed, or reported."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

from ncsr_fast.config import NCSRConfig
from ncsr_fast.training.configuration import configure
from ncsr_fast.training.published import from_published

yaml = pytest.importorskip("yaml")
pytest.importorskip("pydantic")

TEXT = """
name: mine
model: NCSR
scale: 4
mode: softflow
std: 0.04
LRnoise: true
distortion: sr
use_tb_logger: true
gpu_ids: [0]
prob: 1.0
lr: !!float 1e-6
model_path: weights/mine.pth
datasets:
  train: {name: crops, mode: LRHR_IMG, dataroot_GT: ~/hr, batch_size: 6, GT_size: 96, n_workers: 3, use_flip: true,
          use_shuffle: true, quant: 32, color: RGB}
  val: {name: few, mode: LRHR_PKL, dataroot_GT: val.pklv4, dataroot_LQ: val_x4.pklv4, n_max: 5, quant: 32}
network_G:
  which_model_G: NCSRNet
  in_nc: 3
  out_nc: 3
  nf: 64
  nb: 23
  upscale: 4
  train_RRDB: false
  train_RRDB_delay: 0.5
  flow:
    K: 16
    L: 3
    S: [0, 16, 16]
    noInitialInj: true
    std_channels: 3
    coupling: CondAffineSeparatedAndCond
    additionalFlowNoAffine: 2
    split: {enable: true}
    fea_up0: true
    stackRRDB: {blocks: [1, 8, 15, 22], concat: true}
path: {pretrain_model_G: rrdb.pth, strict_load: true, resume_state: auto}
train:
  manual_seed: 7
  lr_G: !!float 3e-4
  lr_RRDB: !!float 1e-5
  weight_decay_G: 0
  beta1: 0.9
  beta2: 0.99
  lr_scheme: MultiStepLR
  warmup_iter: -1
  lr_steps_rel: [0.5, 0.9, 1.0]
  lr_gamma: 0.4
  weight_fl: 1
  weight_l1: 100
  niter: 12000
  val_freq: 400
val: {heats: [0.0, 0.9], n_sample: 2}
logger: {print_freq: 50, save_checkpoint_freq: !!float 1e3}
"""
REPORTED = {
    "gpu_ids", "prob", "lr", "model_path", "datasets.train.name", "datasets.train.dataroot_GT", "datasets.train.quant",
    "datasets.train.color", "datasets.val.name", "datasets.val.dataroot_GT", "datasets.val.quant", "network_G.train_RRDB",
    "network_G.train_RRDB_delay", "network_G.flow.noInitialInj", "train.beta1", "train.beta2", "val.n_sample",
}  # fmt: skip
INERT = {"datasets.train.use_shuffle", "path.strict_load", "path.resume_state", "network_G.upscale"}  # as is done anyway


@pytest.fixture
def options() -> dict:
    return yaml.safe_load(TEXT)


def keys_of(section: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in section.items():
        keys += keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def change(options: dict, changes: dict) -> dict:
    """A copy with other values under dotted keys; ... takes a key away."""
    options = copy.deepcopy(options)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = options
        for name in sections:
            section = section.setdefault(name, {})
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return options


def reported(report) -> set[str]:
    return {line.split(" = ")[0] for line in report}


def test_settings(tmp_path):
    path = tmp_path / "4x-like.yml"
    path.write_text(TEXT)
    done = configure(path)
    settings = done.settings
    assert done.run == "runs/mine"
    assert settings.model == NCSRConfig.preset("ncsr-x4")
    expected = dict(
        images=(os.path.expanduser("~/hr"),), lr_images=(), validation="val.pklv4", validation_lr="val_x4.pklv4",
        validation_images=5, encoder_weights="rrdb.pth", start_from=None, crop=96, batch=6, flip=True, rotate=False, workers=3,
        encoder_steps=0, steps=12_000, lr=3e-4, unfreeze=0.0, unfrozen_lr=1e-5, max_std=0.04, lr_noise=True, nll_weight=1,
        l1_weight=100, milestones=(0.5, 0.9), gamma=0.4, betas=(0.9, 0.999), weight_decay=0, max_grad_norm=None, seed=7,
        log_every=50, validate_every=400, save_every=1000, temperatures=(0.0, 0.9), tensorboard=True,
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert reported(done.report) == REPORTED
    by_key = {line.split(" = ")[0]: line for line in done.report}
    assert "`--betas 0.9 0.99`" in by_key["train.beta1"] and "`--unfreeze 0.5`" in by_key["network_G.train_RRDB_delay"]
    assert all("not known" not in line for line in done.report)


def test_the_command_line_goes_before_a_published_yaml(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text(TEXT)
    given = {"unfreeze": "0.5", "betas": ["0.9", "0.99"], "steps": "10", "images": ["x"], "variant": "noise-all", "run": "r"}
    done = configure(path, given)
    settings = done.settings
    assert (settings.unfreeze, settings.betas, settings.steps, settings.images) == (0.5, (0.9, 0.99), 10, ("x",))
    assert settings.model.noise_steps == (16, 16, 16) and settings.max_std == 0.04 and done.run == "r"
    assert configure(path, {"variant": "srflow"}).settings.max_std == 0
    with pytest.raises(ValueError, match="^preset: .*a.yml is a published YAML file, which has its own architecture"):
        configure(path, {"preset": "ncsr-x4"})


def changes_something(options: dict, key: str) -> bool:
    """Whether the key decides a setting: without it, or with another value, the settings differ or are refused."""
    section = options
    for name in key.split("."):
        value = section = section[name]
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, (int, float)):
        others = [value + 1000]
    elif isinstance(value, list):
        others = [[*value, 0.7]]
    else:
        others = [f"{value}_other"]
    before = from_published(options)[0]
    for other in (..., *others):
        try:
            if from_published(change(options, {key: other}))[0] != before:
                return True
        except (ValueError, TypeError):
            return True
    return False


def account_for(options: dict) -> None:
    """Every key is reported as ignored, or decides a setting, or asks for what is done anyway."""
    ignored = {line.split(" = ")[0] for line in from_published(options)[1] if "is ignored" in line}
    for key in keys_of(options):
        decides = key == "name" or changes_something(options, key)
        assert (key in ignored) != decides or key in INERT, f"{key}: ignored {key in ignored}, decides {decides}"


def test_every_key_is_accounted_for(options):
    account_for(options)


def test_srflow(options):
    """SRFlow's own files have no noise, and the key of one that is not NCSR's does not bring it."""
    network = {"network_G.which_model_G": "SRFlowNet", "network_G.flow.S": ..., "network_G.flow.std_channels": ...}
    options = change(options, {**network, "model": "SRFlow", "mode": ..., "heat": 0.9, "dataroot_LR": "x"})
    values, report = from_published(options)
    assert values["max_std"] == 0 and values["lr_noise"] is False
    assert values["model"] == NCSRConfig.preset("srflow-x4").to_dict()
    assert {"std", "LRnoise", "heat", "dataroot_LR"} <= reported(report)
    account_for(options)


@pytest.mark.parametrize("mode", ("plain", ...))
def test_without_softflow(mode, options):
    values, report = from_published(change(options, {"mode": mode, "LRnoise": False}))
    assert values["max_std"] == 0 and values["model"]["noise_steps"] == [0, 0, 0] and "std" in reported(report)


def test_pkl_crops(options):
    crops = {"mode": "LRHR_PKL", "dataroot_GT": "tr.pklv4", "dataroot_LQ": "tr_x4.pklv4"}
    options = change(options, {f"datasets.train.{key}": value for key, value in crops.items()})
    values, report = from_published(options)
    assert values["images"] == ["tr.pklv4"] and values["lr_images"] == ["tr_x4.pklv4"]
    assert "datasets.train.GT_size" in reported(report) and "datasets.train.dataroot_GT" not in reported(report)
    with pytest.raises(ValueError, match="datasets.train.n_max is not supported"):
        from_published(change(options, {"datasets.train.n_max": 10}))


def test_lr_images_of_a_folder_are_not_read(options):
    values, report = from_published(change(options, {"datasets.train.dataroot_LQ": "lr"}))
    assert values["lr_images"] == [] and "datasets.train.dataroot_LQ" in reported(report)


def test_absent_keys_are_what_the_program_does_without_them(options):
    absent = ("datasets.train.use_flip", "LRnoise", "use_tb_logger", "train.lr_steps_rel", "train.weight_fl", "datasets.val")
    values, _ = from_published(change(options, dict.fromkeys(absent, ...)))
    assert not values["flip"] and not values["lr_noise"] and not values["tensorboard"] and values["milestones"] == []
    assert "nll_weight" not in values and "validation" not in values


@pytest.mark.parametrize(
    "submodule, field", [(..., "encoder_weights"), ("RRDB", "encoder_weights"), (None, "start_from"), ("none", "start_from")]
)
def test_pretrained_weights(submodule, field, options):
    values, _ = from_published(options if submodule is ... else change(options, {"path.load_submodule": submodule}))
    assert [name for name in ("encoder_weights", "start_from") if name in values] == [field] and values[field] == "rrdb.pth"


def test_steps_as_they_are(options):
    values, _ = from_published(change(options, {"train.lr_steps_rel": ..., "train.lr_steps": [100, 200]}))
    assert values["milestones"] == [100, 200]


def test_unknown_keys_and_other_values_are_reported(options):
    changes = {"train.pixel_weight": 1, "datasets.train.use_shuffle": False, "path.resume_state": None, "name": "debug_mine"}
    changes |= {"path.strict_load": False, "network_G.upscale": 8, "datasets.test.mode": "LRHR_IMG"}
    report = from_published(change(options, changes))[1]
    assert reported(report) - REPORTED == {*changes}
    assert "train.pixel_weight = 1 is ignored: it is not known" in report


REFUSED = {
    "train.lr_scheme": "CosineAnnealingLR_Restart",
    "train.restarts": [1000],
    "train.lr_steps_inverse_rel": [0.5],
    "train.lr_steps_rel": "half",
    "train.flow_warm_up_iter": 10,
    "train.niter": None,
    "train.lr_gamma": None,
    "scale": None,
    "model": "SR",
    "distortion": "denoise",
    "mode": "plain",  # with LRnoise
    "datasets.train.mode": "LRHR_IMG_mc",
    "datasets.train.dataroot_GT": "train.lmdb",
    "datasets.train.center_crop_hr_size": 128,
    "datasets.val.dataroot_LQ": None,
    "path.resume_state": "9000.state",
    "path.load_submodule": "flowUpsamplerNet",
    "network_G.flow.coupling": "noCoupling",
    "network_G.flow.levelConditional.conditional": True,
    "network_G.flow.S": 16,
    "std": None,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_we_cannot_do_is_refused_by_name(key, options):
    with pytest.raises(ValueError, match={"mode": "LRnoise", "network_G.flow.S": "network_G"}.get(key, key)):
        from_published(change(options, {key: REFUSED[key]}))


def test_wrong_values_have_the_names_of_the_file(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text(TEXT.replace("lr_G: !!float 3e-4", "lr_G: fast").replace("GT_size: 96", "GT_size: wide"))
    with pytest.raises(ValueError) as error:
        configure(path)
    assert sorted(str(error.value).splitlines()) == [
        f"{path}: datasets.train.GT_size: should be an integer, not 'wide'",
        f"{path}: train.lr_G: should be a number, not 'fast'",
    ]
    path.write_text(TEXT.replace("MultiStepLR", "Cosine"))
    with pytest.raises(ValueError, match=f"^{path}: train.lr_scheme = 'Cosine' is not supported, only 'MultiStepLR'$"):
        configure(path)


def test_warm_up(options):
    assert from_published(options)[0]["warmup"] == 0
    assert from_published(change(options, {"train.warmup_iter": 300}))[0]["warmup"] == 300


def test_fs_ncsr(options):
    options = change(options, {"divide_freq": True})
    values, report = from_published(options)
    assert values["model"] == NCSRConfig.preset("fs-ncsr-x4").to_dict() and values["max_std"] == 0.04 and values["lr_noise"]
    assert reported(report) == REPORTED
    account_for(options)


DEEP = {
    "model": "SRFlow-DA", "mode": ..., "std": ..., "LRnoise": ..., "network_G.which_model_G": "SRFlowNet",
    "network_G.flow.S": ..., "network_G.flow.std_channels": ..., "network_G.flow.K": 6, "network_G.flow.L": 2,
    "train.add_gt_noise": True, "path.root": "../",
}  # fmt: skip


def test_srflow_da(options):
    options = change(options, DEEP)
    values, report = from_published(options)
    assert values["model"] == NCSRConfig.preset("srflow-da-x4").to_dict()
    assert values["max_std"] == pytest.approx(0.00905648) and values["fixed_std"] and not values["lr_noise"]
    assert values["unfreeze"] == 0.5 and "path.root" in reported(report)
    assert "network_G.train_RRDB_delay" not in reported(report) and all("not known" not in line for line in report)
    account_for(options)
    assert from_published(change(options, {"network_G.train_RRDB_delay": ...}))[0]["unfreeze"] == 1
    clean = from_published(change(options, {"train.add_gt_noise": False}))[0]
    assert clean["max_std"] == 0 and "fixed_std" not in clean


LOW_LIGHT = {
    **dict.fromkeys(
        ("mode", "std", "LRnoise", "network_G.flow.S", "network_G.flow.std_channels", "val.heats", "network_G.upscale"), ...
    ),
    "model": "LLFlow", "scale": 1, "dataset": "LoL", "optimize_all_z": False, "cond_encoder": "ConEncoder1",
    "train_gt_ratio": 0.3, "concat_histeq": True, "gray_map": False, "align_weight": 0.001, "dataroot_unpaired": "dark",
    "datasets.train": {"root": "~/LOL", "batch_size": 4, "GT_size": 96, "use_crop": True, "noise_prob": 0, "noise_level": 5,
                       "log_low": True, "gamma_aug": False, "n_workers": 1, "use_flip": True},
    "datasets.val": {"root": "LOL", "log_low": True, "n_max": 20},
    "network_G.which_model_G": "LLFlow", "network_G.nf": 32, "network_G.nb": 4, "network_G.flow.K": 4,
    "network_G.flow.conditionInFeaDim": 64, "network_G.flow.split.enable": False,
    "network_G.flow.stackRRDB.blocks": [1], "path.pretrain_model_G": ..., "train.warmup_iter": 30,
}  # fmt: skip


def test_llflow(options):
    options = change(options, LOW_LIGHT)
    values, report = from_published(options)
    assert values["model"] == NCSRConfig.preset("llflow-lol-smallnet").to_dict()
    root = os.path.expanduser("~/LOL")
    expected = dict(
        images=[f"{root}/our485/high"], lr_images=[f"{root}/our485/low"], validation="LOL/eval15/high",
        validation_lr="LOL/eval15/low", reference_prior=0.3, max_std=0, lr_noise=False, encoder_steps=0, unfreeze=0, warmup=30,
        temperatures=(0.0,), batch=4, crop=96, flip=True, rotate=False,
    )  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert {"train.weight_decay_G", "align_weight", "datasets.val.log_low"} <= reported(report)
    assert all("not known" not in line for line in report)
    account_for(options)


def test_llflow_s_second_data_set(options):
    options = change(options, {**LOW_LIGHT, "dataset": "LoL_v2"})
    values, _ = from_published(options)
    assert len(values["images"]) == len(values["lr_images"]) == 2
    assert values["validation"] == "LOL/Real_captured/Test/high" and values["lr_images"][1].endswith("LOL/Synthetic/Train/Low")
    with pytest.raises(ValueError, match="^dataset = 'mine' is not supported, only 'LoL' and 'LoL_v2'$"):
        from_published(change(options, {"dataset": "mine"}))


@pytest.mark.parametrize("scale, max_std, steps, batch", [(4, 0.05, 220_000, 18), (8, 0.03, 250_000, 1)])
def test_published_files(scale, max_std, steps, batch):
    checkout = os.environ.get("NCSR_PUBLISHED")
    if not checkout:
        pytest.skip("NCSR_PUBLISHED names no checkout of the published program")
    found = [path for path in Path(checkout).rglob(f"{scale}X.yml") if path.parent.name == "confs"]
    assert found, f"no confs/{scale}X.yml in NCSR_PUBLISHED = {checkout}"
    done = configure(found[0])
    settings = done.settings
    assert settings.model == NCSRConfig.preset(f"ncsr-x{scale}")
    assert (settings.max_std, settings.steps, settings.batch) == (max_std, steps, batch)
    assert all("not known" not in line for line in done.report)
    account_for(yaml.safe_load(found[0].read_text()))
