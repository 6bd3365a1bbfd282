"""What is in a run's folder when it is resumed, and what goes wrong while it is written to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_same_weights, log_rows, tiny_config, tiny_settings

from ncsr_fast import NCSR
from ncsr_fast.data import RandomCrops
from ncsr_fast.files import CheckpointError
from ncsr_fast.training import TrainingDiverged, TrainingStopped, train
from ncsr_fast.training.diagnose import without_texture
from ncsr_fast.training.record import _fingerprint, changes, data_record, write_record
from ncsr_fast.training.run import Run
from ncsr_fast.training.stages import FlowStage
from ncsr_fast.training.validation import Validation, lower


@pytest.fixture
def settings(photos):
    """Of two steps of the flow."""
    changes = {"encoder_steps": 0, "steps": 2, "log_every": 1, "save_every": 1, "validate_every": 1}
    return tiny_settings(photos, validation_images=1, validation_size=32, temperatures=(0.0,), **changes)


@pytest.fixture(scope="module")
def finished(kept_photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(settings.__wrapped__(kept_photos), folder, "cpu")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run's folder."""
    return shutil.copytree(finished, tmp_path / "run")


def strictly(text: str):
    """JSON without Python's NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_run_of_an_earlier_version_goes_on(settings, run):
    """Whose model had no field that came later, which then has its default."""
    stored = json.loads((run / "settings.json").read_text())
    del stored["model"]["temperature"]
    (run / "settings.json").write_text(json.dumps(stored))
    train(settings, run, "cpu")


def test_other_settings_are_refused_with_a_way_on(settings, run):
    with pytest.raises(ValueError) as caught:
        train(replace(settings, lr=0.01), run, "cpu")
    assert f"lr (was 0.001, now 0.01); choose another folder; with --start-from {run}/model the" in str(caught.value)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="with --start-from .*/best the new run starts from the weights of this run"):
        train(replace(settings, lr=0.01), run, "cpu")
    shutil.rmtree(run / "best")
    with pytest.raises(ValueError, match="choose another folder$"):
        train(replace(settings, lr=0.01), run, "cpu")


def test_settings_that_came_after_the_run_began_have_their_defaults(settings, run):
    stored = json.loads((run / "settings.json").read_text())
    for name in ("fixed_std", "warmup"):
        del stored[name]
    (run / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="other settings: warmup .was 0, now 5."):
        train(replace(settings, warmup=5), run, "cpu")
    train(settings, run, "cpu")


def test_a_folder_that_was_copied_by_half(settings, run):
    (run / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json' is damaged .*copy it again"):
        train(settings, run, "cpu")
    (run / "settings.json").unlink()
    with pytest.raises(
        ValueError, match="contains checkpoints .*flow-00000002.pt.* but no settings.json: .*not copied completely"
    ):
        train(settings, run, "cpu")


def test_checkpoints_of_something_else(settings, run):
    other = replace(settings, model=tiny_config(steps=2, noise_steps=(0, 1, 1)))
    (run / "settings.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(CheckpointError, match="flow-00000002.pt' is not of a run with these settings: .*of the wrong shape"):
        train(other, run, "cpu")
    (run / "settings.json").write_text(json.dumps(settings.to_dict()))
    for path in (run / "checkpoints").iterdir():
        torch.save({"weights": {}}, path)
    with pytest.raises(CheckpointError, match="it has no best, counters, model"):
        train(settings, run, "cpu")


def test_a_signal_while_a_checkpoint_is_read(settings, run, monkeypatch):
    """It is not taken for damage of the checkpoint."""
    monkeypatch.setattr("ncsr_fast.training.run._load", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TrainingStopped, match="before the first step; nothing was written"):
            train(settings, run, "cpu")


def test_other_files_among_the_checkpoints(settings, run):
    (run / "checkpoints" / "flow-old.pt").write_bytes(b"kept by a user")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings, run, "cpu")
    assert (run / "checkpoints" / "flow-old.pt").exists()


def test_weights_that_a_run_began_with_are_needed_no_longer(settings, finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "start")
    settings = replace(settings, start_from=str(tmp_path / "start"))
    model = train(settings, tmp_path / "run", "cpu")
    shutil.rmtree(tmp_path / "start")
    assert_same_weights(train(settings, tmp_path / "run", "cpu"), model)


def test_other_images_are_told_of_once(settings, run, photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings, run, "cpu")  # the same images in another place
    with Image.open(photos / "b.png") as image:
        pixels = np.array(image)
    pixels[5, 5] ^= 1
    Image.fromarray(pixels).save(photos / "b.png")
    (photos / "nested" / "c.png").rename(photos / "d.png")
    told = r"1 new \(0/d.png\); 1 gone \(0/nested/c.png\); 1 changed \(0/b.png\)"
    with pytest.warns(UserWarning, match=f"images are not those that the run in '.*' began with: {told}. The run continues"):
        train(settings, run, "cpu")
    (row,) = [row for row in log_rows(run) if row.get("event") == "other images"]
    assert (row["stage"], row["step"]) == ("flow", 2) and "1 changed (0/b.png)" in row["changed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings, run, "cpu")
    (run / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="data.json' is damaged .*remove it"):
        train(settings, run, "cpu")


def test_an_image_that_changed_in_nothing_but_its_content(photos, tmp_path):
    record = data_record(RandomCrops(photos, scale=4, crop=32))
    write_record(tmp_path / "data.json", record)
    assert changes(tmp_path / "data.json", record) is None and changes(tmp_path / "none.json", record) is None
    backwards = {**record, "images": record["images"][::-1]}
    assert changes(tmp_path / "data.json", backwards) == "the same images in another order"
    content = bytearray((photos / "a.png").read_bytes())
    content[-20] ^= 1
    (photos / "a.png").write_bytes(content)
    assert changes(tmp_path / "data.json", data_record(RandomCrops(photos, scale=4, crop=32))) == "1 changed (0/a.png)"


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "tga"])
@pytest.mark.parametrize("place", [0, 0.25, 0.5, 0.75, 1])
def test_a_pixel_that_changed(tmp_path, suffix, place):
    """At any place of an image of more bytes than are looked at of a compressed one."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 1000, 3), dtype=np.uint8)
    records = []
    for _ in range(2):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
        records.append(data_record(RandomCrops(tmp_path, scale=4, crop=32))["images"])
        pixels.reshape(-1)[int(place * (pixels.size - 1))] ^= 1
    assert records[0][0][:4] == records[1][0][:4] and records[0][0][4] != records[1][0][4]


@pytest.mark.parametrize(
    "magic", [b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"....ftyp", b"....jP  ", b"\xff\x4f\xff\x51", b"BM"]
)
def test_a_byte_that_changed(tmp_path, magic):
    """Compressed files are looked at where they begin, in the middle and where they end; others everywhere."""
    path, content, seen = tmp_path / "x", bytearray(magic.ljust(700_000)), []
    path.write_bytes(content)
    before = _fingerprint(path)
    for place in (60_000, 200_000, 350_000, 500_000, 699_999):
        content[place] ^= 1
        path.write_bytes(content)
        seen.append(_fingerprint(path) != before)
        content[place] ^= 1
    assert seen == [True, magic == b"BM", True, magic == b"BM", True]


def test_images_in_pickles_and_pairs_are_recorded(photos, tmp_path):
    arrays = [np.full((64, 64, 3), value, dtype=np.uint8) for value in (1, 2)]
    (tmp_path / "a.pklv4").write_bytes(pickle.dumps(arrays))
    crops = RandomCrops([photos, tmp_path / "a.pklv4"], scale=4, crop=32)
    *_, first, second = data_record(crops)["images"]
    assert (first[:4], second[:4]) == (["1[0]", 64, 64, 64 * 64 * 3], ["1[1]", 64, 64, 64 * 64 * 3]) and first[4] != second[4]
    (tmp_path / "lr").mkdir()
    for path in photos.rglob("*.png"):
        Image.new("RGB", (30, 24)).save(tmp_path / "lr" / path.name)
    shutil.move(photos / "nested" / "c.png", photos / "c.png")
    pair = data_record(RandomCrops(photos, tmp_path / "lr", scale=4, crop=32))["images"][2]
    assert pair[:3] == ["0/c.png", 96, 120] and pair[5:8] == ["1/c.png", 24, 30]


def test_images_left_out_are_recorded(settings, photos, tmp_path):
    (photos / "e.png").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 4 images are skipped"):
        train(replace(settings, steps=0), tmp_path / "run", "cpu")
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [image[0] for image in record["images"]] == ["0/a.png", "0/b.png", "0/nested/c.png"]
    assert "not an image" in record["left_out"][str(photos / "e.png")]


def test_damaged_lines_of_the_log_are_dropped(settings, run, finished):
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes("".join([lines[0], "3\n", "{}\n", *lines[1:], '{"stage": "fl']).encode() + b"\xff\0\n\xff")
    with pytest.warns(UserWarning, match="line 2 of '.*log.jsonl' is damaged and is ignored"):
        train(settings, run, "cpu")
    assert (run / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


def test_a_validation_that_was_not_done_is_made_up_for(settings, run, finished, monkeypatch):
    """The checkpoint comes before the validation of its step, so a run may be stopped between them."""
    whole = (finished / "log.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert '"validation"' in lines[-1]
    (run / "log.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(run / "best")
    shutil.copytree(finished / "best", run / "best")
    train(settings, run, "cpu")
    assert (run / "log.jsonl").read_text() == whole
    assert json.loads((run / "best" / "validation.json").read_text()) == json.loads(
        (finished / "best" / "validation.json").read_text()
    )
    monkeypatch.setattr(Validation, "__call__", lambda *arguments: pytest.fail("it is in the log"))
    train(settings, run, "cpu")


def test_a_checkpoint_comes_before_the_validation_of_its_step(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def gone(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Validation, "__call__", gone)
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, save_every=100, validate_every=100), run, "cpu")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["flow-00000002.pt"]


def test_a_validation_that_fails_is_passed_over(settings, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    original, calls = FlowStage.validate, []

    def validate(self, *arguments):
        calls.append(None)
        if len(calls) in (2, 3, 4):  # the second image of the first step, both of the second
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nat a length")
        return original(self, *arguments)

    monkeypatch.setattr(FlowStage, "validate", validate)
    train(replace(settings, validation_images=2), run, "cpu")
    events = [row for row in log_rows(run) if row.get("event") == "validation failed"]
    assert [(row["step"], row["image"]) for row in events] == [(1, 1), (2, 0), (2, 1)]
    assert {row["problem"] for row in events} == {"OutOfMemoryError: CUDA out of memory"}
    assert "flow 2: validation image 0 is skipped (OutOfMemoryError" in capsys.readouterr().out
    assert [row["step"] for row in log_rows(run) if "validation" in row] == [1], "of the image that was looked at"
    assert (run / "model").is_dir() and not (run / "best").exists(), "which is no comparison with others"


def test_a_full_disk_is_named_and_costs_no_checkpoint(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save = torch.save

    def full(state, path):
        if state["step"] == 1:
            return save(state, path)
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0\nframe #0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"flow-00000002.pt' could not be written \(\[enforce .* 0, \d+ MiB are free on the disk\); once"
        ):
            train(settings, run, "cpu")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["flow-00000001.pt"]
    train(settings, run, "cpu")


def test_what_is_written_is_json(settings, tmp_path):
    run = Run(tmp_path, settings)
    run.begin()
    run.log("flow", 1, loss=float("nan"), validation={"psnr@0": float("inf"), "nll": 1.5})
    run.save_model(NCSR(settings.model), "best", {"step": 1, "nll": 1.5, "psnr@0": float("inf")})
    expected = {"psnr@0": None, "nll": 1.5}
    assert strictly((tmp_path / "log.jsonl").read_text()) == {"stage": "flow", "step": 1, "loss": None, "validation": expected}
    assert strictly((tmp_path / "best" / "validation.json").read_text()) == {"step": 1, **expected}


def test_the_lowest_nll_is_a_number():
    nan, inf = float("nan"), float("inf")
    assert lower(None, {"nll": nan}) is None and lower(None, {"nll": -inf}) is None and lower(None, {}) is None
    assert lower(2.0, {"nll": nan}) == 2 and lower(2.0, {"nll": None}) == 2 and lower(2.0, {"nll": 3.0}) == 2
    assert lower(None, {"nll": 3.0}) == 3 and lower(2.0, {"nll": 1.0}) == 1


@pytest.mark.slow
def test_the_default_dtype_changes_nothing(settings, tmp_path):
    settings = replace(settings, l1_weight=1.0)
    plain = train(settings, tmp_path / "plain", "cpu")
    try:
        torch.set_default_dtype(torch.float64)
        model = train(settings, tmp_path / "run", "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_weights(model, plain)
    assert log_rows(tmp_path / "run", timeless=True) == log_rows(tmp_path / "plain", timeless=True)


def test_flat_images_are_named_where_their_likelihood_diverges(tmp_path, photos):
    for number in range(2):
        Image.new("RGB", (64, 64), (30 * number + 20, 90, 200)).save(photos / f"flat{number}.png")
    plain = {"model": tiny_config(noise_channels=0, noise_steps=()), "max_std": 0.0, "encoder_steps": 0, "steps": 100}
    only = tmp_path / "only"
    only.mkdir()
    for path in photos.glob("flat*.png"):
        path.rename(only / path.name)
    settings = tiny_settings(only, max_skipped=2, validate_every=1000, log_every=1000, save_every=1000, **plain)
    with pytest.raises(TrainingDiverged) as caught:
        train(settings, tmp_path / "run", "cpu")
    said = str(caught.value)
    assert "crops are flat, from 2 images: '" in said and "flat0.png" in said and "flat1.png" in said
    assert "leave them out, or train with noise, --max-std 0.02 or --variant noise" in said


def test_photographs_are_not_flat():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    ramp = (x + y)[None].expand(3, -1, -1)
    rows, even = (y * 2)[None].expand(3, -1, -1), torch.full((3, 64, 64), 7)
    half = torch.where(x < 32, 200, (x * 5 + y * 3) % 251)[None].expand(3, -1, -1)
    images = torch.stack([ramp, rows, even, half]).to(torch.uint8)
    assert without_texture(images).tolist() == [False, True, True, False]
