"""Tables of GPUs: which entry holds, which of them "auto" follows, and what is said of files and modes that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import fresh_process

from ncsr_fast import ops, tuning
from ncsr_fast.ops import backend as backends

COVERAGE = backends.COVERAGE
HERE = tuning.Gpu("Acme A1", "9.0")
KERNELS = {  # what "auto" tries on any GPU before the reference: as before there were tables
    "affine": ("triton", "native"),
    "gaussian_split": ("triton", "native"),
    "flow_step": ("triton", "native"),
    "inverse_logdet": ("triton", "native"),
    "fold": (),
    "conv3x3": (),
    "step_network": (),
}


def entry(kernel="affine", backend="triton", gain=2.0, kind="measured", dtype=None) -> dict:
    return {"kernel": kernel, "dtype": dtype, "backend": backend, "gain": gain, "provenance": {"kind": kind}}


def sizes(kernel="affine_kernel", channels=16, **sizes) -> dict:
    return {"kernel": kernel, "channels": channels, "sizes": sizes, "gain": 1.1, "provenance": {"kind": "measured"}}


class Tables:
    """The package's tables and the user's, on a GPU that is not there."""

    def __init__(self, folder: Path) -> None:
        self.packaged, self.mine = folder / "package", folder / "config" / "ncsr_fast" / "gpus"
        for each in (self.packaged, self.mine):
            each.mkdir(parents=True)
        self.write(self.packaged, None, None, entry(kind="established", gain=None))

    def write(self, folder: Path, gpu: str | None, capability: str | None, *entries: dict) -> Path:
        lists = {
            "tiles": [each for each in entries if "sizes" in each],
            "backends": [each for each in entries if "backend" in each],
        }
        file = folder / (tuning.file_name(gpu) if gpu else "default.json")
        file.write_text(json.dumps({"gpu": gpu, "capability": capability, **lists}))
        backends.forget()
        return file


@pytest.fixture
def tables(tmp_path, monkeypatch):
    tables = Tables(tmp_path)
    monkeypatch.setattr(tuning, "PACKAGED", tables.packaged)
    monkeypatch.setattr(tuning, "gpu", lambda: HERE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in (tuning.MODE, tuning.USERS):
        monkeypatch.delenv(name, raising=False)
    backends.forget()
    yield tables
    backends.forget()


@pytest.fixture
def every_backend(monkeypatch):
    """A GPU on which all backends are there."""
    monkeypatch.setattr(backends, "_missing", backends._not_covered)


def chosen(kernel: str, dtype: torch.dtype = torch.float32) -> str:
    """The choice of "auto" for tensors of a GPU."""
    return backends.covering_backend(kernel, "auto", SimpleNamespace(device=torch.device("cuda"), dtype=dtype))


# -- the package's own table ---------------------------------------------------------------------------------------------


def test_the_default_table_knows_every_kernel_of_a_gpu():
    default = tuning.read(tuning.PACKAGED / "default.json")
    covered = {(kernel, name) for name, table in COVERAGE.items() for kernel, each in table.items() if "cuda" in each.devices}
    covered = {key for key in covered if key[0] not in backends.COMPANIONS}
    listed = [(choice.kernel, choice.backend) for choice in default.backends]
    assert covered <= set(listed) and len(listed) == len(set(listed))
    used = {(choice.kernel, choice.backend) for choice in default.backends if choice.used}
    assert used == {(kernel, backend) for kernel, names in KERNELS.items() for backend in names}


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_table_of_the_gpu_auto_chooses_as_before(kernel, monkeypatch, every_backend):
    monkeypatch.setattr(tuning, "gpu", lambda: None)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    backends.forget()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        able = [name for name in KERNELS[kernel] if not backends._not_covered(name, kernel, "cuda", str(dtype))]
        assert chosen(kernel, dtype) == (*able, "reference")[0]
    backends.forget()


# -- which entry holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, gain, expected",
    [
        ("measured", 1.01, "triton"),
        ("measured", 1.0, "reference"),
        ("measured", 0.5, "reference"),
        ("predicted", 1.3, "triton"),
        ("predicted", 1.29, "reference"),
        ("established", None, "triton"),
        ("unmeasured", None, "reference"),
    ],
)
def test_a_gain_counts_by_where_it_comes_from(tables, every_backend, kind, gain, expected):
    tables.write(tables.packaged, HERE.name, "9.0", entry(kind=kind, gain=gain))
    assert chosen("affine") == expected


def test_the_nearest_table_holds(tables, every_backend):
    """This GPU's, the user's first; then one of its capability; then the one of any GPU, but never another's."""
    tables.write(tables.packaged, "Another", "8.0", entry(gain=0.1))
    assert chosen("affine") == "triton"
    alike = tables.write(tables.packaged, "Alike", "9.0", entry(gain=0.2))
    assert chosen("affine") == "reference"
    exact = tables.write(tables.packaged, HERE.name, "9.0", entry(gain=3.0))
    assert chosen("affine") == "triton"
    mine = tables.write(tables.mine, HERE.name, "9.0", entry(gain=0.3))
    assert chosen("affine") == "reference"
    assert [table.file for table in tuning._tables()] == [mine, exact, alike, tables.packaged / "default.json"]


def test_what_a_table_lacks_is_found_in_the_next(tables, every_backend):
    """By backend, so that one which is measured to be slow does not hide another."""
    tables.write(tables.packaged, None, None, entry(kind="established"), entry(kind="established", backend="native"))
    tables.write(tables.mine, HERE.name, "9.0", entry(gain=0.5), entry(kernel="flow_step", gain=0.5))
    assert chosen("affine") == "native" and chosen("flow_step") == "reference"


def test_the_first_backend_of_a_table_that_is_there_runs(tables, every_backend, monkeypatch):
    tables.write(tables.mine, HERE.name, "9.0", entry(backend="native", gain=3.0), entry(gain=2.0))
    assert chosen("affine") == "native"
    monkeypatch.setattr(backends, "_missing", lambda name, *_: "gone" if name == "native" else "")
    backends.forget()
    assert chosen("affine") == "triton"


def test_an_entry_of_another_dtype_does_not_hold(tables, every_backend):
    tables.write(tables.mine, HERE.name, "9.0", entry(gain=0.5, dtype="bfloat16"))
    assert chosen("affine", torch.bfloat16) == "reference" and chosen("affine") == "triton"


def test_the_mode_default_asks_the_package_alone(tables, every_backend, monkeypatch):
    tables.write(tables.mine, HERE.name, "9.0", entry(gain=0.3))
    monkeypatch.setenv(tuning.MODE, "default")
    backends.forget()
    assert chosen("affine") == "triton"


def test_the_mode_strict_refuses_what_was_not_measured(tables, every_backend, monkeypatch):
    tables.write(tables.packaged, "Alike", "9.0", entry(kernel="flow_step"))
    tables.write(tables.mine, HERE.name, "9.0", entry(), sizes(num_warps=8))
    monkeypatch.setenv(tuning.MODE, "strict")
    backends.forget()
    assert chosen("affine") == "triton" and tuning.tiles("affine_kernel", 12) == {"num_warps": 8}
    assert chosen("fold") == "reference"  # which no backend has on a GPU
    with pytest.raises(tuning.TuningMissing, match="Acme A1 says which backend runs 'flow_step' in float32.*ncsr-fast tune"):
        chosen("flow_step")
    with pytest.raises(tuning.TuningMissing, match="the tiles of 'affine_kernel' for 24 channels"):
        tuning.tiles("affine_kernel", 24)


def test_another_mode_is_refused(tables, monkeypatch):
    monkeypatch.setenv(tuning.MODE, "fuzzy")
    with pytest.raises(ValueError, match="NCSR_FAST_TUNING must be one of 'strict', 'nearest', 'default', not 'fuzzy'"):
        chosen("affine")


def test_a_table_that_is_named_is_the_users(tables, every_backend, monkeypatch, tmp_path):
    tables.write(tables.mine, HERE.name, "9.0", entry(gain=3.0))
    elsewhere = tables.write(tmp_path, HERE.name, "9.0", entry(gain=0.3))
    monkeypatch.setenv(tuning.USERS, str(elsewhere))
    backends.forget()
    assert chosen("affine") == "reference"


# -- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, largest", [(1, 1), (12, 16), (16, 16), (17, 32), (96, 128), (192, 256)])
def test_bucket(channels, largest):
    assert tuning.bucket(channels) == largest


def test_tiles_are_of_a_kernel_and_a_bucket_of_channels(tables):
    tables.write(tables.mine, HERE.name, "9.0", sizes(BLOCK_P=128), sizes(channels=32, BLOCK_P=32))
    tables.write(tables.packaged, HERE.name, "9.0", sizes(BLOCK_P=1), sizes("other_kernel", BLOCK_P=2))
    kernels = ("affine_kernel", "other_kernel")
    found = {(kernel, channels): tuning.tiles(kernel, channels) for kernel in kernels for channels in (12, 24)}
    assert found == {
        ("affine_kernel", 12): {"BLOCK_P": 128},
        ("affine_kernel", 24): {"BLOCK_P": 32},
        ("other_kernel", 12): {"BLOCK_P": 2},
        ("other_kernel", 24): {},
    }


def test_tiles_that_are_tried_hold_meanwhile(tables):
    tables.write(tables.mine, HERE.name, "9.0", sizes(BLOCK_P=128))
    with tuning.trying("affine_kernel", 12, {"BLOCK_P": 8}):
        assert tuning.tiles("affine_kernel", 16) == {"BLOCK_P": 8}
    assert tuning.tiles("affine_kernel", 16) == {"BLOCK_P": 128}


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tables):
    file = tables.write(tables.mine, HERE.name, "9.0", entry(), entry(kind="unmeasured", gain=None), sizes(BLOCK_P=128))
    table = tuning.read(file)
    file.write_text(tuning.text(table))
    assert tuning.read(file) == table and len(table.backends) == 2 and table.tiles[0].sizes == {"BLOCK_P": 128}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{", "Expecting property name"),
        ('{"gpu": "A", "capability": "9.0", "tiles": []}', "'backends'"),
        (
            json.dumps({"gpu": "A", "capability": "9.0", "tiles": [], "backends": [entry(kind="guessed")]}),
            "kind of provenance 'guessed'",
        ),
        (
            json.dumps({"gpu": "A", "capability": "9.0", "tiles": [], "backends": [entry(gain="2")]}),
            "measured has the gain '2'",
        ),
        (json.dumps({"gpu": "A", "capability": "9.0", "tiles": [], "backends": [{"kernel": "affine"}]}), "missing 4 required"),
    ],
)
def test_a_file_that_is_no_table_is_named(tables, text, problem):
    (tables.mine / "a.json").write_text(text)
    with pytest.raises(
        ValueError, match=f"a.json' is not a table of a GPU: .*{problem}.*; write it again with `ncsr-fast tune`"
    ):
        chosen("affine")


def test_tables_are_read_once_and_not_for_a_cpu(tables, every_backend, monkeypatch):
    read, count = tuning.read, []
    monkeypatch.setattr(tuning, "read", lambda file: count.append(file) or read(file))
    ops.affine_injector(torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 2, 2))
    assert count == []
    for _ in range(2):
        assert chosen("affine") == "triton" and tuning.tiles("affine_kernel", 12) == {}
    assert len(count) == 1


@pytest.mark.slow
def test_importing_reads_no_table(tmp_path):
    code = "from ncsr_fast import ops, tuning; print(tuning._tables.cache_info().misses, ops.OPERATORS[0])"
    assert fresh_process(code, tmp_path) == "0 actnorm_invconv"


def test_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / "ncsr_fast" / "gpus"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # which the specification has ignored
    assert tuning.user_folder() == Path("~/.config/ncsr_fast/gpus").expanduser()
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
