"""A run's folder is its own: nothing of others in it is replaced or removed, and nothing in it is trained on."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from support import contents, tiny_model, tiny_settings

from ncsr_fast.training import train
from ncsr_fast.training.run import Run


@pytest.fixture
def settings(photos):
    """Of a single step."""
    return tiny_settings(photos, encoder_steps=0, steps=1, validation_images=1, validation_size=32)


def refused(settings, run) -> str:
    """What is said of a start in a folder of other things, which are as they were, and of nothing else."""
    before = contents(run)
    with pytest.raises(ValueError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings, run, "cpu")
    assert contents(run) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "name, text", [("cache/thesis.txt", "x"), ("lock", "mine"), ("model/config.json", "{}"), (".hidden", ""), ("log.jsonl", "")]
)
def test_a_folder_of_other_things_is_refused(settings, tmp_path, name, text):
    run = tmp_path / "mine"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text(text)
    first = name.partition("/")[0]
    assert f"mine' contains '{first}' and no settings.json, so it is not a run's folder, and" in refused(settings, run)


def test_settings_of_another_program_are_no_run(settings, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text('{"editor": "vi"}')
    assert "settings.json' does not contain settings of a training run; choose another folder" in refused(
        settings, tmp_path / "mine"
    )


@pytest.mark.parametrize("lock", [None, "", '{"pid": 1, "host": "elsewhere", "since": "long ago"}'])
def test_what_a_killed_start_leaves_is_no_obstacle(settings, tmp_path, lock):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".settings.json.ab_1xyz.json").touch()
    if lock is not None:
        (run / "lock").write_text(lock)
    train(settings, run, "cpu")
    assert (run / "model").is_dir()


def test_what_others_put_among_its_files_stays(settings, tmp_path):
    run, kept = tmp_path / "run", ("cache/thesis.txt", "cache/deep/thesis.txt", "checkpoints/.gitignore", "checkpoints/.x.pt")
    Run(run, settings).begin()
    (run / "checkpoints" / ".flow-00000001.pt.ab_1xyz.pt").write_text("half")  # by a process that was killed
    for name in kept:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("precious")
    (run / "cache" / "host").mkdir()  # of another machine, that was killed as it wrote
    for name in ("lock", "pixels", ".index.ab_1xyz"):
        (run / "cache" / "host" / name).touch()
    train(replace(settings, cache_gib=0.1), run, "cpu")
    assert sorted(name for name in contents(run) if "cache/" in name or "/." in name) == sorted(["cache/deep", *kept])


@pytest.mark.parametrize("name", ["start_from", "encoder_weights"])
def test_weights_in_the_folder_of_a_run(settings, tmp_path, name):
    """A run writes its own to the same place."""
    model = tiny_model()
    (model if name == "start_from" else model.encoder).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "model")
    settings = replace(settings, **{name: str(tmp_path / "link")})
    refused(settings, tmp_path / "run")
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings.to_dict()))
    assert f"{name}: '{tmp_path}/link' is in the run's folder '{tmp_path}/run', to which" in refused(settings, tmp_path / "run")


def test_a_run_among_its_images(settings, photos):
    said = refused(settings, photos / "nested" / "run")
    assert said.startswith(f"the run's folder '{photos}/nested/run' is inside images '{photos}', so that its samples would be")


@pytest.mark.parametrize("name", ["images", "lr_images", "validation", "validation_lr"])
def test_a_run_among_its_images_through_a_link(settings, photos, tmp_path, name):
    (tmp_path / "others").mkdir()
    places = {key: tmp_path / key for key in ("images", "lr_images", "validation", "validation_lr")}
    for place in places.values():
        place.mkdir()
    (places[name] / "link").symlink_to(tmp_path / "others")
    given = {key: (str(place),) if "images" in key else str(place) for key, place in places.items()}
    said = refused(replace(settings, **given), tmp_path / "others" / "run")
    assert f"others/run' is inside {name} '{tmp_path}/{name}', by way of '{tmp_path}/{name}/link', so that its samples" in said


@pytest.mark.parametrize("target", ["samples", "samples/flow-00000001.png"])
def test_images_in_the_folder_of_a_run(settings, photos, tmp_path, target):
    run = tmp_path / "run"
    train(settings, run, "cpu")
    link = photos / "z.png"
    link.symlink_to(run / target)
    said = refused(settings, run)
    assert said.startswith(f"images: '{photos}' has images in the run's folder '{run}', by way of '{link}', and the run would")
