"""`ncsr-fast sample`: what it writes, what it passes over, and what it refuses."""

from __future__ import annotations

import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from support import full_disk, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.cli.main import main
from ncsr_fast.data import crop_margins, low_light_input, pad_mirrored, read_image, to_uint8
from ncsr_fast.flow import samples
from ncsr_fast.flow.samples import ConditionedFlow
from ncsr_fast.metrics import lr_psnr


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
    arguments = ["--out", str(tmp_path / "out"), "--model", model, "--n", "1", "--names", "ntire"]
    assert main(["sample", str(photos), *arguments]) == 1
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


def images(folder, *names, size=(6, 4)):
    """Small flat pictures of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (60, 120, 180)).save(folder / name)
    return folder


def sample(model, *arguments):
    return main(["sample", *map(str, arguments), "--model", model, "--n", "1", "--device", "cpu"])


def outputs(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("second", ["a.jpg", "A.png", "a.tif"])
def test_samples_that_would_have_the_same_names(model, tmp_path, capsys, second):
    """Also where only a file system without a difference between A and a would take them for the same."""
    images(tmp_path / "in", "a.png", second, "b.png")
    arguments = (tmp_path / "in", "--out", tmp_path / "out")
    assert sample(model, *arguments, "--names", "source") == 1
    err = capsys.readouterr().err
    assert "a.png'" in err and f"{second}'" in err and "would have the same names" in err and not (tmp_path / "out").exists()
    assert sample(model, *arguments, "--names", "ntire") == 0
    assert len(outputs(tmp_path / "out")) == 3


def test_the_same_name_in_two_folders(model, tmp_path):
    images(tmp_path / "in", "x/a.png", "y/a.png")
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 0
    assert outputs(tmp_path / "out") == ["x/a_sample00000.png", "y/a_sample00000.png"]


@pytest.mark.parametrize("source, out", [("in", "in"), ("in", "in/out"), ("in", "disk/out"), ("in/*.png", "in"), ("in", "all")])
def test_samples_that_would_be_input(model, tmp_path, capsys, source, out):
    """In the folder itself, one in it, one that a link in it leads to, one above it by the name of an image."""
    images(tmp_path / "in", "a.png", "in/c.png")
    images(tmp_path, "disk/b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "all").symlink_to(tmp_path)
    before = outputs(tmp_path)
    assert sample(model, tmp_path / source, "--out", tmp_path / out, "--names", "source") == 1
    assert "would be input of the next run" in capsys.readouterr().err
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("source, out", [("in", "."), ("in/*.png", "in/out")])
def test_samples_beside_the_input(model, tmp_path, source, out):
    images(tmp_path / "in", "a.png")
    for _ in range(2):
        assert sample(model, tmp_path / source, "--out", tmp_path / out, "--names", "ntire") == 0
    assert outputs(tmp_path / out) == sorted(["000000_sample00000.png", *(["in/a.png"] if out == "." else [])])


@pytest.mark.parametrize("made", ["b_sample00000.png", "nested"])
def test_something_else_in_the_place_of_a_sample(model, tmp_path, capsys, made):
    """Of one image; the others are sampled."""
    images(tmp_path / "in", "a.png", "nested/b.png" if made == "nested" else "b.png", "z.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / made).touch() if made == "nested" else (tmp_path / "out" / made).mkdir()
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    assert {"a_sample00000.png", "z_sample00000.png"} <= set(outputs(tmp_path / "out"))
    out, err = capsys.readouterr()
    assert "2 of 3 images" in out and "b.png': a folder is where a sample, or a file where a folder of samples should be" in err


def test_a_sample_that_would_replace_an_input(model, tmp_path, capsys):
    images(tmp_path, "a.png", "a_sample00000.png")
    before = (tmp_path / "a_sample00000.png").read_bytes()
    both = (tmp_path / "a.png", tmp_path / "a_sample00000.png")
    assert sample(model, *both, "--out", tmp_path, "--names", "source") == 1
    assert "would replace the input" in capsys.readouterr().err
    assert (tmp_path / "a_sample00000.png").read_bytes() == before


def test_samples_of_an_earlier_run_are_replaced_or_named(model, tmp_path, capsys):
    images(tmp_path, "a.png")
    images(tmp_path / "out", "a_sample00000.png", "a_sample00001.png", size=(1, 1))
    assert sample(model, tmp_path / "a.png", "--out", tmp_path / "out", "--names", "source") == 0
    assert read_image(tmp_path / "out" / "a_sample00000.png").shape == (3, 16, 24)
    assert re.search("1 samples of an earlier run are still in the folder: '.*a_sample00001.png'\n", capsys.readouterr().err)


def test_several_inputs_patterns_and_home(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images(tmp_path, "a.png", "b.png", "more/c.png", "odd[1].png")
    inputs = ("~/a.png", f"{tmp_path}/[ab].png", "~/more", "~/odd[1].png")
    assert main(["sample", *inputs, "--out=~/out", "--model", model, "--n", "1", "--names", "source"]) == 0
    assert outputs(tmp_path / "out") == [f"{stem}_sample00000.png" for stem in ("a", "b", "c", "odd[1]")], "a once"
    assert sample(model, f"{tmp_path}/z*.png", "--out", tmp_path / "out") == 1
    assert re.search(r"no file matches '.*z\*.png'", capsys.readouterr().err)


OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")


def test_an_image_too_large_for_memory_is_passed_over(model, tmp_path, capsys, monkeypatch):
    call = NCSR.condition

    def limited(self, lr, **options):
        if lr.shape[2] == 50:
            raise OUT_OF_MEMORY
        return call(self, lr, **options)

    monkeypatch.setattr(NCSR, "condition", limited)
    images(tmp_path / "in", "a.png", "c.png")
    images(tmp_path / "in", "b.png", size=(60, 50))
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    out, err = capsys.readouterr()
    assert outputs(tmp_path / "out") == ["a_sample00000.png", "c_sample00000.png"]
    assert "b.png' does not fit in memory, not even in small tiles: take a smaller --model, or crop it" in err
    assert out.startswith("2 of 3 images × 1 samples → ") and err.endswith("1 of 3 images were not sampled as asked\n")
    assert sample(model, tmp_path / "in" / "b.png", "--out", tmp_path / "out", "--tile", "none") == 1
    assert "b.png' does not fit in memory as a whole: use --tile auto" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A directory with a tiny float64 model, so that what rounding changes is no grey level."""
    model = tiny_model()
    with torch.no_grad():
        for level in model.levels:
            for branch in level.branches:
                level.networks(branch).conv3.mul_(0.3)
    return str(model.save_pretrained(tmp_path_factory.mktemp("exact")))


def written(out):
    """The bytes of all samples."""
    return {name: (out / name).read_bytes() for name in outputs(out)}


def draw(model, *arguments):
    return main(["sample", *map(str, arguments), "--model", model, "--device", "cpu", "--n", "3", "--temperature", "0.2"])


@pytest.fixture
def pictures(tmp_path):
    """A folder of three small pictures, one of them in a folder of its own."""
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png", "nested/c.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(generator.integers(0, 255, (5, 7, 3), dtype=np.uint8))
        pixels.resize((26, 19), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


@pytest.mark.parametrize("way", ["tiles", "whole", "alone", "groups", "less memory", "threads"])
def test_a_seed_gives_an_image_its_samples_whatever_the_way(exact, pictures, tmp_path, monkeypatch, threads, way):
    assert draw(exact, pictures / "nested", pictures / "a.png", "--out", tmp_path / "expected", "--seed", 4) == 0
    arguments = [pictures / "nested", pictures / "a.png", "--out", tmp_path / "out", "--seed", "4"]
    if way in ("tiles", "whole"):
        arguments += ["--tile", "5" if way == "tiles" else "none"]
    if way == "alone":
        arguments = arguments[1:]
        for path in (tmp_path / "expected").glob("c_*"):
            path.unlink()
    if way == "groups":
        monkeypatch.setattr("ncsr_fast.cli._sampling.Sampler._together", lambda *_: 2)
    if way == "less memory":
        call = ConditionedFlow.sample

        def limited(flow, n, *arguments, **options):
            if n > 1:
                call(flow, n, *arguments, **options)  # draws from the generator first
                raise OUT_OF_MEMORY
            return call(flow, n, *arguments, **options)

        monkeypatch.setattr(ConditionedFlow, "sample", limited)
    if way == "threads":
        threads(2)
    assert draw(exact, *arguments) == 0
    assert written(tmp_path / "out") == written(tmp_path / "expected")


def test_the_shares_of_several_processes_are_all_images(exact, pictures, tmp_path, monkeypatch, capsys):
    assert draw(exact, pictures, "--out", tmp_path / "expected") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert draw(exact, pictures, "--out", tmp_path / "out") == 0
        assert len(outputs(tmp_path / "out")) == (3 if rank else 9)
    assert written(tmp_path / "out") == written(tmp_path / "expected")
    out, err = capsys.readouterr()
    assert "process 2 of 2: 1 images × 3 samples → " in out and "process 1 of 2: 2 images × 3 samples → " in out
    assert "earlier" not in err


def test_an_interrupted_run_goes_on(exact, pictures, tmp_path, capsys):
    """Images all of whose samples are there are not sampled again; one of whose some are is."""
    assert draw(exact, pictures, "--out", tmp_path / "out") == 0
    expected = written(tmp_path / "out")
    (tmp_path / "out" / "a_sample00002.png").unlink()
    (tmp_path / "out" / "b_sample00000.png").write_text("not looked at")
    (tmp_path / "out" / "a_sample00000.png").write_text("written anew")
    capsys.readouterr()
    assert draw(exact, pictures, "--out", tmp_path / "out", "--skip-existing") == 0
    assert written(tmp_path / "out") == {**expected, "b_sample00000.png": b"not looked at"}
    assert capsys.readouterr().out.startswith("1 of 3 images × 3 samples, 2 were there → ")


def test_a_large_image_is_told_of(exact, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ncsr_fast.cli._sampling._TOLD", 2**20)
    assert draw(exact, pictures / "a.png", "--out", tmp_path / "out", "--tile", "6") == 0
    err = capsys.readouterr().err
    assert re.search(r"a.png: 26×19 → 104×76, about 0\.\d GiB, in tiles\n", err) and re.search(r"samples 1 to 3: +\d+%", err)


@pytest.mark.parametrize("recommended", [None, 0.0])
def test_the_temperature_is_what_the_model_recommends(pictures, tmp_path, recommended):
    model = tiny_model(**({} if recommended is None else {"temperature": recommended}))
    model.save_pretrained(tmp_path / "model")
    arguments = ["sample", pictures / "a.png", "--out", tmp_path / "out", "--model", tmp_path / "model", "--n", "1"]
    with mock.patch.object(ConditionedFlow, "sample", autospec=True, side_effect=ConditionedFlow.sample) as call:
        main(list(map(str, arguments)))
        main(list(map(str, [*arguments, "--temperature", "0.3,0.2"])))
    assert [call.args[2] for call in call.call_args_list] == [0.9 if recommended is None else recommended, [0.3, 0.2]]


def test_projected_samples_are_reported(tmp_path, capsys, monkeypatch):
    """With the smallest LR-PSNR, which may be infinite."""
    noisy = np.random.default_rng(0).choice([0, 90, 180, 255], (5, 4, 3)).astype(np.uint8)
    Image.fromarray(noisy).resize((12, 16), Image.Resampling.BILINEAR).save(tmp_path / "b.png")
    arguments = ["--n", "2", "--out", str(tmp_path / "out"), "--temperature", "0.3"]
    assert main(["sample", str(tmp_path / "b.png"), *arguments, "--project"]) == 0
    told = re.search(r"projected onto the LR images: LR-PSNR at least (\d+\.\d) dB\n", capsys.readouterr().out)
    lr = read_image(tmp_path / "b.png")[None]
    measured = [float(lr_psnr(read_image(tmp_path / "out" / f"b_sample0000{k}.png")[None], lr, 4)) for k in range(2)]
    assert float(told[1]) == round(min(measured), 1)
    assert main(["sample", str(tmp_path / "b.png"), *arguments]) == 0
    assert "projected onto" not in capsys.readouterr().out
    monkeypatch.setattr("ncsr_fast.cli._sampling.Sampler.lr_psnr", lambda *_: math.inf)
    assert main(["sample", str(tmp_path / "b.png"), *arguments, "--project"]) == 0
    assert "projected onto the LR images: their bicubic reductions are the LR images\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value", [("--tile", "0"), ("--tile", "some"), ("--temperature", "0.3,-1"), ("--temperature", "")]
)
def test_what_options_may_not_be(model, photos, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        sample(model, photos, "--out", tmp_path / "out", option, value)
    assert "should be" in capsys.readouterr().err


def test_nonfinite_samples_of_one_image_do_not_end_a_folder(tmp_path, capsys, recwarn, monkeypatch):
    broken = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        broken.levels[0].actnorm_bias[0] = torch.nan
    monkeypatch.setattr(NCSR, "from_pretrained", lambda path: broken)  # no file with such weights is loaded
    images(tmp_path / "in", "a.png", "b.png")
    arguments = (tmp_path / "in", "--out", tmp_path / "out", "--on-nonfinite")
    assert sample(str(tmp_path / "model"), *arguments, "raise") == 1
    err = capsys.readouterr().err
    assert err.count("weights of the model are not finite") == 2 and "2 of 2 images were not sampled" in err
    assert not (tmp_path / "out").exists()
    assert sample(str(tmp_path / "model"), *arguments, "ignore") == 1
    assert capsys.readouterr().err.count("have pixels that are not finite, which are black. 1 weights of the model") == 2


def test_what_a_folder_holds_beside_images_is_named(model, tmp_path):
    images(tmp_path / "in", "a.png")
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.warns(UserWarning, match="left out: 1 that end in .txt"):
        assert sample(model, tmp_path / "in", "--out", tmp_path / "out") == 0


def test_names_too_long_for_a_file(model, tmp_path, capsys):
    images(tmp_path / "in", "a.png", f"{'n' * 245}.png")
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    assert "the names of its samples are too long; use --names ntire" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == ["a_sample00000.png"]


def test_a_full_disk(model, tmp_path, capsys):
    images(tmp_path, "a.png", size=(40, 30))
    with full_disk(20):
        assert sample(model, tmp_path / "a.png", "--out", tmp_path / "out") == 1
    assert re.search(r"sample: '.*a_sample00000.png': File too large; .*\n$", capsys.readouterr().err)
    assert outputs(tmp_path / "out") == []


def test_sample_dark_photographs(low_light_model, tmp_path):
    """Of any size, of a folder; once each, at temperature 0: the file is what the same steps in Python make."""
    (tmp_path / "dark").mkdir()
    for name, size in (("a.png", (13, 21)), ("b.jpg", (32, 48))):
        array = np.random.default_rng(0).integers(0, 60, (*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "dark" / name)
    arguments = ["sample", str(tmp_path / "dark"), "--model", low_light_model, "--names", "source", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "bright")]) == 0
    assert sorted(path.name for path in (tmp_path / "bright").iterdir()) == ["a_sample00000.png", "b_sample00000.png"]
    model = NCSR.from_pretrained(low_light_model)
    padded, margins = pad_mirrored(read_image(tmp_path / "dark" / "a.png"))
    with torch.no_grad():
        likely = model.sample(low_light_input(padded)[None], n=1, temperature=0.0)[0, 0]
    written = read_image(tmp_path / "bright" / "a_sample00000.png")
    assert torch.equal(written, to_uint8(crop_margins(likely, margins))) and written.shape == (3, 13, 21)
    assert main([*arguments, "--out", str(tmp_path / "warm"), "--temperature", "0.5"]) == 0
    assert len(list((tmp_path / "warm").iterdir())) == 2 * 10


def test_temperature_0_is_one_image_unless_n_says_more(model, photos, tmp_path):
    arguments = ["sample", str(photos / "a.png"), "--model", model, "--temperature", "0"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0 and len(list((tmp_path / "one").iterdir())) == 1
    assert main([*arguments, "--out", str(tmp_path / "two"), "--n", "2"]) == 0 and len(list((tmp_path / "two").iterdir())) == 2


def test_samples_that_blew_up_are_called_as_their_files(exact, pictures, tmp_path, capsys, monkeypatch):
    """By the file and by the number in its run, in whatever groups they are drawn: 0 and 1, then 2 alone, which blows up."""
    monkeypatch.setattr("ncsr_fast.cli._sampling.Sampler._together", lambda *_: 2)

    drawn = samples.draw

    def draw_last(levels, lr, n, *arguments):
        return [latent * (math.inf if n == 1 else 1) for latent in drawn(levels, lr, n, *arguments)]

    monkeypatch.setattr(samples, "draw", draw_last)
    with pytest.warns(RuntimeWarning) as given:
        assert draw(exact, pictures / "a.png", pictures / "b.png", "--out", tmp_path / "out") == 1
    told = [str(warning.message) for warning in given]
    assert len(told) == 2
    for name, line in zip(("a", "b"), told):
        assert line.startswith(f"'{pictures / name}.png': 1 of 1 samples (number 2) at temperature 0.2 blew up: "), line
        assert "(image 0, sample 2). " in line
        black = {path.name for path in (tmp_path / "out").glob(f"{name}_*") if not read_image(path).any()}
        assert black == {f"{name}_sample00002.png"}
