"""The YAML files of the published programs (NCSR, SRFlow, FS-NCSR, SRFlow-DA, LLFlow), read as settings of our training.

What their keys do was read in the programs. Where a key does nothing there, it does nothing here, and the report says
what to give instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ncsr_fast.config import NCSRConfig
from ncsr_fast.systems import DEEP_STD, SYSTEMS

# fields of TrainSettings whose value is that of a key
RENAMED = {
    "seed": "train.manual_seed",
    "lr": "train.lr_G",
    "unfrozen_lr": "train.lr_RRDB",
    "weight_decay": "train.weight_decay_G",
    "gamma": "train.lr_gamma",
    "nll_weight": "train.weight_fl",
    "l1_weight": "train.weight_l1",
    "steps": "train.niter",
    "validate_every": "train.val_freq",
    "max_std": "std",
    "warmup": "train.warmup_iter",
    "lr_noise": "LRnoise",
    "reference_prior": "train_gt_ratio",
    "tensorboard": "use_tb_logger",
    "batch": "datasets.train.batch_size",
    "crop": "datasets.train.GT_size",
    "workers": "datasets.train.n_workers",
    "flip": "datasets.train.use_flip",
    "rotate": "datasets.train.use_rot",
    "temperatures": "val.heats",
    "log_every": "logger.print_freq",
    "save_every": "logger.save_checkpoint_freq",
}

# behaviour of the program that its file does not set, or cannot set
_PROGRAM: dict[str, Any] = {
    "flip": False, "rotate": False, "lr_noise": False, "tensorboard": False, "encoder_steps": 0, "unfreeze": 0.0,
    "betas": (0.9, 0.999), "max_grad_norm": None,
}  # fmt: skip

_REQUIRED = ("scale", "train.lr_G", "train.niter", "train.lr_gamma")

# keys that are read elsewhere in this module, or by NCSRConfig.from_published
_READ = {
    "scale", "mode", "divide_freq", "path.pretrain_model_G", "path.load_submodule", "train.lr_scheme", "train.lr_steps",
    "train.lr_steps_rel", "train.add_gt_noise", "model", "distortion", "name", "datasets.train.mode", "datasets.val.mode",
    "datasets.val.dataroot_GT", "datasets.train.dataroot_GT", "datasets.train.dataroot_LQ", "datasets.val.dataroot_LQ",
    "datasets.val.n_max",
    *(f"network_G.{key}" for key in ("which_model_G", "in_nc", "out_nc", "nf", "nb", "gc", "train_RRDB_delay")),
    *(f"network_G.flow.{key}" for key in (
        "K", "L", "S", "std_channels", "coupling", "additionalFlowNoAffine", "fea_up0", "flow_permutation", "norm", "norm.type",
        "stackRRDB.blocks", "stackRRDB.concat", "split.enable", "split.correct_splits", "split.conditional",
        "split.consume_ratio", "split.logs_eps", "CondAffineSeparatedAndCond.hidden_channels", "CondAffineSeparatedAndCond.eps",
    )),
}  # fmt: skip
# those that LLFlow's files have beside them
_READ_IN_LOW_LIGHT = {
    "dataset", "cond_encoder", "concat_histeq", "optimize_all_z", "avg_color_map", "histeq_as_input", "concat_color_map",
    "gray_map", "align_condition_feature", "to_yuv", "encode_color_map", "le_curve", "sigmoid_output",
    "datasets.train.root", "datasets.val.root", "datasets.train.log_low", "datasets.train.gamma_aug",
    "network_G.flow.conditionInFeaDim",
}  # fmt: skip

_DEEP = tuple(name for name in SYSTEMS if name.startswith("srflow-da"))
# of LLFlow's data sets the folders of bright and of dark photographs; of validation the first pair
_DATASETS = {
    "LoL": {"train": [("our485/high", "our485/low")], "val": [("eval15/high", "eval15/low")]},
    "LoL_v2": {
        "train": [(f"{part}/Train/Normal", f"{part}/Train/Low") for part in ("Real_captured", "Synthetic")],
        "val": [("Real_captured/Test/high", "Real_captured/Test/low")],
    },
}

# keys that would change the training in ways that this library does not have
_REFUSED = (
    "train.restarts", "train.restarts_rel", "train.restart_weights", "train.lr_steps_inverse", "train.lr_steps_inverse_rel",
    "train.flow_warm_up_iter", "datasets.train.noise_prob", "datasets.train.center_crop_hr_size",
    "network_G.flow.levelConditional.conditional", "network_G.flow.split.cond_channels",
)  # fmt: skip

_TEST = "only the published test program reads it; `ncsr-fast sample` and `evaluate` have options for it"
_UNREAD = "nothing in the published program reads it"
_IGNORED = {
    "train.beta1": "the published program passes it to Adam under a name that Adam ignores, and trains with betas 0.9 0.999,"
    " which is also done here; give `--betas 0.9 0.99` for the values in the file",
    "network_G.train_RRDB": _UNREAD,
    "network_G.train_RRDB_delay": "the published program trains the encoder from the first step whatever the key says, which is"
    " also done here; give `--unfreeze 0.5` to train the encoder from halfway on",
    "network_G.upscale": "the published program reads `scale`",
    "network_G.flow.noInitialInj": _UNREAD,
    "network_G.flow.hidden_channels": "the couplings have their own key, `CondAffineSeparatedAndCond.hidden_channels`",
    "network_G.flow.augmentation.noiseQuant": "no noise of quantization is added in the published program's training",
    "gpu_ids": "`--device` chooses the GPU, and torchrun uses several",
    "prob": "the published program no longer uses it",
    "lr": "the published program no longer uses it; `train.lr_G` is the learning rate",
    "model_path": _TEST,
    "heat": _TEST,
    "n_sample": _TEST,
    "dataroot_unpaired": _TEST,
    "dataroot_GT": _TEST,
    "dataroot_LR": _TEST,
    "test.heats": _TEST,
    "path.results_root": _TEST,
    "path.root": "`--run` is the folder of the run",
    "align_weight": "it belongs to align_condition_feature",
    "align_maxpool": "it belongs to align_condition_feature",
    "datasets.train.noise_level": "it belongs to noise_prob",
    "datasets.val.log_low": "the input in validation is made as in training",
    "path.strict_load": "weights that do not fit the model are always refused",
    "path.resume_state": "a run in the folder is always resumed; another `--run` starts a new run",
    "train.clear_state": "it applies at restarts, and there are none",
    "train.add_gt_noise": "no noise is added to the target in the published program's training",
    "train.T_period": "it belongs to another lr_scheme",
    "train.T_period_rel": "it belongs to another lr_scheme",
    "train.eta_min": "it belongs to another lr_scheme",
    "val.n_sample": "one sample is drawn at each temperature",
    "datasets.train.use_shuffle": "crops are always drawn at random, there and here",
    "datasets.train.use_crop": "crops are always cut at random",
    "datasets.train.n_max": "the published program reads it in LRHR_PKL alone",
    "datasets.val.batch_size": "images are validated one by one, there and here",
    "datasets.val.use_shuffle": "images are validated in their order, there and here",
    "datasets.val.n_workers": "the published program reads it only in datasets.train",
    "datasets.val.use_flip": "images are validated on as they are",
    "datasets.val.use_rot": "images are validated on as they are",
    **dict.fromkeys(
        ("datasets.val.GT_size", "datasets.val.use_crop", "datasets.val.center_crop_hr_size"),
        "the middle of each image is used for validation; `--validation-size` sets its size",
    ),
    **{
        f"datasets.{phase}.{key}": reason
        for phase in ("train", "val")
        for key, reason in {
            "name": "it is only printed",
            "color": _UNREAD,
            "quant": "no noise of quantization is added in the published program's training",
            "dataroot_y_labels": "the published program does nothing with it",
        }.items()
    },
}
_IGNORED["train.beta2"] = _IGNORED["train.beta1"]


def from_published(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings from a published YAML file, given as the dict of a YAML reader, and a report of keys not followed exactly.

    Returns:
        Values of the fields of TrainSettings that the file sets; and a line for each key that is ignored, or followed with a
        difference.

    Raises:
        ValueError: A key asks for something that this library does not do; the message names it.
    """
    leaves = dict(_leaves(options))
    _refuse(leaves)
    model = _architecture(options)
    values = {field: leaves[key] for field, key in RENAMED.items() if leaves.get(key) is not None}
    values = {**_PROGRAM, **values, "model": model.to_dict(), "milestones": _milestones(leaves), "warmup": _warmup(leaves)}
    ignored = dict(_IGNORED)
    if not _noise(leaves):
        values.update(max_std=0.0, lr_noise=False)
        ignored.update(dict.fromkeys(("std", "LRnoise"), "there is no noise without NCSRNet and mode: softflow"))
    if model.system in _DEEP:
        values.update(_deep(leaves))
        for key in ("network_G.train_RRDB_delay", "train.add_gt_noise"):
            del ignored[key]
    elif model.system == "llflow":
        values.update(_low_light(leaves))
    weights = leaves.get("path.pretrain_model_G")
    if weights is not None:
        # the program loads the encoder alone unless the file has load_submodule: none
        whole = str(leaves.get("path.load_submodule", "RRDB")).lower() == "none"
        values["start_from" if whole else "encoder_weights"] = os.path.expanduser(weights)
    for phase, names in (("train", ("images", "lr_images")), ("val", ("validation", "validation_lr"))):
        if f"datasets.{phase}.mode" in leaves:
            values.update(zip(names, _data(leaves, phase)))
        if leaves.get(f"datasets.{phase}.mode") == "LRHR_IMG":
            ignored[f"datasets.{phase}.dataroot_LQ"] = "LRHR_IMG makes the LR images itself"
    if leaves.get("datasets.val.mode") == "LRHR_PKL" and leaves.get("datasets.val.n_max") is not None:
        values["validation_images"] = leaves["datasets.val.n_max"]
    else:
        ignored["datasets.val.n_max"] = (
            "the published program reads it only in LRHR_PKL; `--validation-images` limits the number of images"
        )
    return values, list(_report(leaves, ignored, model.system == "llflow"))


def _report(leaves: Mapping[str, Any], ignored: Mapping[str, str], is_low_light: bool) -> Iterator[str]:
    same: dict[str, Any] = {  # values that ask for what is done anyway
        "network_G.upscale": leaves["scale"],
        "path.strict_load": True,
        "path.resume_state": "auto",
        "datasets.train.use_shuffle": True,
    }
    differences = {"datasets.val.dataroot_GT": "the middle of each image is used; `--validation-size` sets its size"}
    if leaves.get("datasets.train.mode") == "LRHR_IMG":
        differences["datasets.train.dataroot_GT"] = "subfolders, and images of other formats than PNG, are read too"
    elif "datasets.train.use_crop" not in leaves:
        differences["datasets.train.GT_size"] = "the published program takes stored crops whole, without use_crop"
    if is_low_light:
        differences |= {
            "train.weight_decay_G": "the published program decays the encoder's weights by 1e-5 whatever it says",
            "datasets.val.root": "of LoL_v2 the captured images alone are validated on, of each image the middle",
        }
    if "debug" in str(leaves.get("name")):
        differences["name"] = "the published program would log, validate and save every few steps for this name"
    known = {*_READ, *_REFUSED, *RENAMED.values()}
    if is_low_light:
        known |= _READ_IN_LOW_LIGHT
    for key, value in leaves.items():
        if key in same and value == same[key]:
            continue
        if key in ignored or key not in known:
            yield f"{key} = {value!r} is ignored: {ignored.get(key, 'it is not known')}"
        elif key in differences:
            yield f"{key} = {value!r} is followed, with a difference: {differences[key]}"


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that are not sections, with values, in the file's order, such as ("train.lr_G", 2e-4)."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refuse(leaves: Mapping[str, Any]) -> None:
    for key in _REQUIRED:
        if leaves.get(key) is None:
            raise ValueError(f"the options have no {key}")
    for key, supported in {
        "model": ("NCSR", "SRFlow", "LLFlow", *(SYSTEMS[name].title for name in _DEEP)),
        "distortion": ("sr",),
        "train.lr_scheme": ("MultiStepLR",),
        "path.resume_state": ("auto", None),
        "path.load_submodule": ("RRDB", "none", "None", None),
        "network_G.flow.split.type": ("Split2d", None),
    }.items():
        if key in leaves and leaves[key] not in supported:
            raise ValueError(f"{key} = {leaves[key]!r} is not supported, only {' and '.join(map(repr, supported))}")
    for key in _REFUSED:
        if leaves.get(key):
            raise ValueError(f"{key} = {leaves[key]!r} is not supported")
    if leaves.get("datasets.train.mode") == "LRHR_PKL" and leaves.get("datasets.train.n_max") is not None:
        raise ValueError("datasets.train.n_max is not supported: all crops of a .pklv4 file are used")


def _deep(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The noise of SRFlow-DA's program, and when it trains the encoder."""
    delay = leaves.get("network_G.train_RRDB_delay")
    values: dict[str, Any] = {"unfreeze": 1.0 if delay is None else delay}
    if leaves.get("train.add_gt_noise") is not False:
        values |= {"max_std": DEEP_STD, "fixed_std": True}
    return values


def _low_light(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """LLFlow's data and what its program does where the file says nothing."""
    dataset = leaves.get("dataset")
    if dataset not in _DATASETS:
        raise ValueError(f"dataset = {dataset!r} is not supported, only {' and '.join(map(repr, _DATASETS))}")
    values: dict[str, Any] = {}
    for phase, names in (("train", ("images", "lr_images")), ("val", ("validation", "validation_lr"))):
        root = leaves.get(f"datasets.{phase}.root")
        if root is not None:
            for name, folders in zip(names, zip(*_DATASETS[dataset][phase])):
                places = [os.path.join(os.path.expanduser(root), folder) for folder in folders]
                values[name] = places if phase == "train" else places[0]
    return {"temperatures": leaves.get("val.heats") or (0.0,), **values}


def _noise(leaves: Mapping[str, Any]) -> bool:
    """True if noise is added to training images."""
    if leaves["network_G.which_model_G"] != "NCSRNet":
        return False
    if leaves.get("mode") == "softflow":
        if leaves.get("std") is None:
            raise ValueError("the options have no std, which mode: softflow needs")
        return True
    if leaves.get("std") and leaves.get("LRnoise"):
        raise ValueError(
            f"LRnoise = {leaves['LRnoise']!r} is not supported without mode: softflow: noise on the LR image alone"
        )
    return False


def _architecture(options: Mapping[str, Any]) -> NCSRConfig:
    try:
        # without a mode the program passes no noise to the model
        return NCSRConfig.from_published({**options, "mode": options.get("mode")})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"network_G does not describe a model: {error}") from error


def _warmup(leaves: Mapping[str, Any]) -> Any:
    """Steps; negative numbers mean none."""
    steps = leaves.get("train.warmup_iter") or 0
    return max(steps, 0) if isinstance(steps, (int, float)) else steps


def _milestones(leaves: Mapping[str, Any]) -> list[Any]:
    """The milestones, as fractions that follow `--steps`; without those from 1 on, which would be read as steps."""
    fractions = leaves.get("train.lr_steps_rel")
    if fractions is None:
        return leaves.get("train.lr_steps") or []
    if not isinstance(fractions, list) or not all(isinstance(place, (int, float)) for place in fractions):
        raise ValueError(f"train.lr_steps_rel should be a list of numbers, not {fractions!r}")
    return [place for place in fractions if place < 1]


def _data(leaves: Mapping[str, Any], phase: str) -> tuple[Any, Any]:
    """The places of the HR and LR images of a phase, training or validation."""
    section = f"datasets.{phase}"
    mode = leaves[f"{section}.mode"]
    if mode not in ("LRHR_IMG", "LRHR_PKL"):
        raise ValueError(f"{section}.mode = {mode!r} is not supported, only 'LRHR_IMG' and 'LRHR_PKL'")
    places = []
    for key in ("dataroot_GT", "dataroot_LQ") if mode == "LRHR_PKL" else ("dataroot_GT",):
        place = leaves.get(f"{section}.{key}")
        if not isinstance(place, str):
            raise ValueError(f"{section}.{key} should be a path, which {mode} needs, not {place!r}")
        if place.endswith("lmdb"):
            raise ValueError(f"{section}.{key} = {place!r} is not supported: LMDB is not read, only images and .pklv4 files")
        places.append(os.path.expanduser(place))
    hr, lr = (*places, None)[:2]
    return (hr, lr) if phase == "val" else ([hr], [lr] if lr else [])
