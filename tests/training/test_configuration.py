"""Settings from a YAML, a preset, a variant and overrides, and what is said about wrong ones."""

from __future__ import annotations

import sys

import pytest

from ncsr_fast.config import PRESETS, NCSRConfig
from ncsr_fast.training.configuration import VARIANTS, configure
from ncsr_fast.training.settings import PUBLISHED, TrainSettings

pytest.importorskip("yaml")
pytest.importorskip("pydantic")


@pytest.fixture
def write(tmp_path):
    """Writes text to a.yml and returns its path."""

    def to_file(text: str) -> str:
        path = tmp_path / "a.yml"
        path.write_text(text)
        return str(path)

    return to_file


def lines_of(path, overrides=None) -> list[str]:
    """The lines of the error, without the file's name."""
    with pytest.raises(ValueError) as error:
        configure(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(error.value).splitlines()]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_its_architecture_and_settings(preset):
    pairs = {"lr_images": ("dark",)} if preset.startswith("llflow") else {}
    done = configure(overrides={"preset": preset, "images": ["photos"], **pairs})
    assert done.settings == TrainSettings(NCSRConfig.preset(preset), ("photos",), **pairs, **PUBLISHED[preset])
    assert done.run is None and done.report == ()


def test_systems_that_the_trainer_has_not():
    with pytest.raises(ValueError, match="model must be of RGB images: the trainer has no CTFlow"):
        TrainSettings(NCSRConfig.preset("ctflow"), ("photos",))


def test_a_yaml(write):
    done = configure(
        write("preset: ncsr-x8\nimages: [a, b]\nlr: 2e-4\nencoder_lr: 1.0e-3\nsteps: 1e5\nsave_every: 500.0\nflip: no\n"
              "max_grad_norm: null\nmilestones: 0.5\nmodel: {hidden_channels: 32}\nrun: elsewhere\nstart_from: ~\n")
    )  # fmt: skip
    settings = done.settings
    assert settings.images == ("a", "b") and settings.flip is False and settings.milestones == (0.5,)
    assert (settings.lr, settings.encoder_lr, settings.max_std) == (2e-4, 1e-3, 0.03)
    assert (settings.steps, settings.save_every) == (100_000, 500) and isinstance(settings.steps, int)
    assert settings.max_grad_norm is None and settings.start_from is None
    assert settings.model == NCSRConfig(**{**PRESETS["ncsr-x8"], "hidden_channels": 32})
    assert done.run == "elsewhere"


def test_the_run_is_called_after_the_yaml(write):
    path = write("images: photos\n")
    assert configure(path).run == "runs/a" and configure(path).settings.images == ("photos",)
    assert configure(path, {"run": "mine"}).run == "mine"


def test_paths_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yml").write_text("images: [~/photos]\nrun: ~/runs/a\n")
    done = configure(tmp_path / "a.yml")
    assert done.settings.images == (f"{tmp_path}/photos",) and done.run == f"{tmp_path}/runs/a"


def test_texts_of_a_command_line():
    given = {
        "preset": "ncsr-compact-x4", "images": ["1", "b"], "steps": "1e3", "lr": "2e-4", "flip": "false", "graph": "none",
        "max_grad_norm": "None", "milestones": ["0.5", "900"], "model": {"steps": "2", "stacked_blocks": ["0", "3"]},
    }  # fmt: skip
    settings = configure(overrides=given).settings
    assert settings.images == ("1", "b") and settings.steps == 1000 and settings.lr == 2e-4 and settings.flip is False
    assert settings.graph is None and settings.max_grad_norm is None and settings.milestones == (0.5, 900)
    assert settings.model.steps == 2 and settings.model.stacked_blocks == (0, 3)


def test_what_goes_before_what(write):
    # default 18, preset 16, YAML 5, command line 3
    path = write("preset: ncsr-compact-x4\nimages: [a]\n")
    assert configure(overrides={"images": ["a"]}).settings.batch == 18
    assert configure(path).settings.batch == 16
    path = write("preset: ncsr-compact-x4\nimages: [a]\nbatch: 5\nmodel: {steps: 8, hidden_channels: 16}\n")
    assert configure(path).settings.batch == 5
    settings = configure(path, {"batch": "3", "model": {"steps": "6"}}).settings
    assert settings.batch == 3 and (settings.model.steps, settings.model.hidden_channels) == (6, 16)
    # variant over preset, YAML over variant, and the command line's variant over the YAML's
    path = write("images: [a]\nvariant: srflow\n")
    assert configure(path).settings.max_std == 0
    assert configure(path, {"variant": "std"}).settings.max_std == 0.05
    path = write("images: [a]\nvariant: srflow\nmax_std: 0.01\n")
    assert configure(path).settings.max_std == 0.01
    assert configure(path, {"max_std": "0.02"}).settings.max_std == 0.02
    path = write("images: [a]\nvariant: noise-all\nmodel: {noise_steps: [1, 2, 3]}\n")
    assert configure(path).settings.model.noise_steps == (1, 2, 3)
    assert configure(write("preset: ncsr-x8\nimages: [a]"), {"preset": "srflow-x4"}).settings.model.scale == 4


EXPECTED = {  # noise_channels, and noise_steps at ×4 and ×8
    "noise": (3, (0, 16, 16), (0, 0, 16, 16)),
    "noise-all": (3, (16, 16, 16), (20, 20, 20, 20)),
    "std": (1, (0, 16, 16), (0, 0, 16, 16)),
    "no-layer": (3, (0, 0, 0), (0, 0, 0, 0)),
    "srflow": (0, (0, 0, 0), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("scale", (4, 8))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, scale):
    channels, *steps = EXPECTED[variant]
    settings = configure(overrides={"preset": f"ncsr-x{scale}", "variant": variant, "images": ["a"]}).settings
    assert settings.model.noise_channels == channels and settings.model.noise_steps == steps[scale // 8]
    assert settings.max_std == (0 if variant == "srflow" else {4: 0.05, 8: 0.03}[scale])


def test_a_variant_with_noise_brings_it_to_srflow():
    settings = configure(overrides={"preset": "srflow-x8", "variant": "noise", "images": ["a"]}).settings
    assert settings.max_std == 0.03 and settings.model.noise_channels == 3 and settings.model.steps == 16


def test_layers_follow_the_depth_and_the_scale():
    given = {"preset": "ncsr-compact-x4", "images": ["a"]}
    assert configure(overrides={**given, "model": {"steps": 8}}).settings.model.noise_steps == (0, 8, 8)
    assert configure(overrides={**given, "model": {"scale": "8"}}).settings.model.noise_steps == (0, 0, 4, 4)
    assert configure(overrides={"images": ["a"], "model": {"steps": 20}}).settings.model.noise_steps == (0, 20, 20)


PROBLEMS = {
    "unknown": ("imagse: [a]\nimages: [a]", "imagse: is not known; did you mean images?"),
    "unknown-model": ("images: [a]\nmodel: {step: 4}", "model.step: is not known; did you mean steps?"),
    "number": ("images: [a]\nlr: fast", "lr: should be a number, not 'fast'"),
    "integer": ("images: [a]\nsteps: 1.5", "steps: should be an integer, not 1.5"),
    "integer-text": ("images: [a]\nsteps: many", "steps: should be an integer, not 'many'"),
    "truth-for-number": ("images: [a]\nbatch: yes", "batch: should be an integer, not 'true'"),
    "truth": ("images: [a]\nflip: sometimes", "flip: should be true or false, not 'sometimes'"),
    "text": ("images: [a]\nprecision: 16", "precision: should be text, not 16"),
    "item": ("images: [a]\nmilestones: [0.5, end]", "milestones[1]: should be a number, not 'end'"),
    "list": ("images: [a]\nmilestones:", "milestones: should be a list, not None"),
    "length": ("images: [a]\nbetas: [0.9]", "betas[1]: has the wrong number of values: [0.9]"),
    "images": ("lr: 1", "images is missing"),
    "preset": ("images: [a]\npreset: ncsr-x2", f"preset: should be one of {', '.join(PUBLISHED)}, not 'ncsr-x2'"),
    "variant": ("images: [a]\nvariant: some", "variant: should be one of noise, noise-all, std, no-layer, srflow, not 'some'"),
    "run": ("images: [a]\nrun: 3", "run: should be a folder, not 3"),
    "empty-run": ("images: [a]\nrun: ''", "run: should be a folder, not ''"),
    "empty-path": ("images: ['']", "images must be a path, not an empty text"),
    "range": ("images: [a]\ncrop: 90", "crop must be a positive multiple of 2·scale = 8, not 90"),
    "model-range": ("images: [a]\nmodel: {scale: 3}", "model.scale must be 4 or 8, not 3"),
    "model-type": ("images: [a]\nmodel: {steps: deep}", "model.steps: should be an integer, not 'deep'"),
    "model": ("images: [a]\nmodel: big", "model: should hold `key: value` lines of NCSRConfig's fields, not 'big'"),
    "list-yaml": ("- images", "should hold `key: value` lines, not list \"['images']\""),
    "empty": ("", "should hold `key: value` lines, not NoneType 'None'"),
    "syntax": ("images: [a]\nlr: [1\nsteps: 3\n", "line 3: expected ',' or ']', but got ':'"),
    "binary": ("images: \0", "not YAML: unacceptable character #x0000: special characters are not allowed"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name, write):
    text, expected = PROBLEMS[name]
    path = write(text)
    with pytest.raises(ValueError) as error:
        configure(path)
    assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)


def test_all_problems_at_once_and_whose_they_are(write):
    path = write("lr: fast\nmodel: {steps: x}\nvariant: y\nbathc: 3\n")
    with pytest.raises(ValueError) as error:
        configure(path, {"crop": "wide"})
    lines = sorted(str(error.value).splitlines())
    assert [line.removeprefix(f"{path}: ").split(" ")[0].rstrip(":") for line in lines] == [
        "bathc", "images", "lr", "model.steps", "variant", "crop",
    ]  # fmt: skip
    assert [line.startswith(f"{path}: ") for line in lines] == [True] * 5 + [False]
    assert lines_of(path, {"images": ["a"], "lr": "1", "variant": "std", "model": {"steps": 3}}) == [
        "bathc: is not known; did you mean batch?"
    ]


def test_a_folder_is_no_yaml(tmp_path):
    assert lines_of(str(tmp_path)) == ["should be a YAML file, not a folder; folders of images go in `images`"]
    with pytest.raises(FileNotFoundError):
        configure(tmp_path / "none.yml")


@pytest.mark.parametrize("package", ("yaml", "pydantic"))
def test_missing_packages_are_named(package, write, monkeypatch):
    path = write("images: [a]\n")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"settings of a training run needs {package}: pip install 'ncsr_fast\[train\]'"):
        configure(path)


def test_variants_are_ncsr_s_alone():
    given = {"preset": "srflow-da-x4", "images": ["a"], "variant": "noise"}
    with pytest.raises(ValueError, match="^variant: is for NCSR: SRFlow-DA has no noise-conditional layer$"):
        configure(overrides=given)
    settings = configure(overrides={**given, "preset": "fs-ncsr-x4", "variant": "noise-all"}).settings
    assert settings.model == NCSRConfig(**{**PRESETS["fs-ncsr-x4"], "noise_steps": (16, 16, 16)})


def test_the_presets_of_the_family_are_their_yamls():
    deep = configure(overrides={"preset": "srflow-da-s-x8", "images": ["a"]}).settings
    assert (deep.max_std, deep.fixed_std, deep.lr_noise, deep.unfreeze, deep.batch) == (
        pytest.approx(4 / 3**0.5 / 255), True, False, 0.5, 16
    )  # fmt: skip
    low = configure(overrides={"preset": "llflow-lol", "images": ["a"], "lr_images": ["b"]}).settings
    assert (low.max_std, low.reference_prior, low.unfreeze, low.encoder_steps, low.warmup) == (0, 0.2, 0, 0, 3000)
    assert low.learning_rate(1.0, 0, 40_000) == 1 / 3000 and low.learning_rate(1.0, 2999, 40_000) == 1


LOW = {"preset": "llflow-compact", "images": ["a"], "lr_images": ["b"]}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lr_images": []}, "lr_images must name the dark images of images, which LLFlow is trained on in pairs"),
        ({"validation": "c"}, "validation_lr must name the dark images of validation, which LLFlow is trained on in pairs"),
        ({"encoder_steps": 1}, "encoder_steps must be 0: the encoder of LLFlow makes no image, not 1"),
        ({"encoder_weights": "w"}, "encoder_weights must be left out: they are of RRDB networks, which LLFlow has none of"),
        ({"lr_noise": True}, "lr_noise must be false: the input of LLFlow is no image that noise is added to"),
        ({"reference_prior": 1.5}, "reference_prior must be a share from 0 to 1, not 1.5"),
        ({"crop": 36}, "crop must be a positive multiple of 8·scale = 8, not 36"),
        ({"preset": "ncsr-x4", "reference_prior": 0.1}, "reference_prior must be 0: the prior of NCSR has no mean, not 0.1"),
        ({"model": {"system": "ctflow"}}, "model must be of RGB images: the trainer has no CTFlow"),
    ],
)
def test_low_light_settings(changes, said):
    with pytest.raises(ValueError) as error:
        configure(overrides={**LOW, **changes})
    assert str(error.value) == said
