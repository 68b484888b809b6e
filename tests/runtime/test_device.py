"""The runtime: choosing one changes nothing, and a run restores the process settings that it changes."""

import ctypes
import sys

import fresh
import pytest
import timm
import torch
from tiny_runs import make_config
from torch import nn

import moe_bsr
from moe_bsr.config import ConfigError, RuntimeConfig
from moe_bsr.runtime import allocator
from moe_bsr.runtime.device import Runtime, exact_convolutions, most_threads, prepare, tune_process

CUDA_BF16 = Runtime(torch.device("cuda"), "bf16", 1, "asked for")


def process_state() -> tuple:
    """Return the settings that a library must leave unchanged."""
    cudnn = torch.backends.cudnn
    return (
        torch.get_num_threads(),
        timm.layers.is_fast_norm(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        cudnn.conv.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.fixture
def no_mallopt(monkeypatch):
    def refuse() -> None:
        pytest.fail("the allocator was set")

    monkeypatch.setattr(allocator, "keep_freed_memory", refuse)


IMPORT_ANEW = """
import ctypes, sys, timm, torch
cudnn = torch.backends.cudnn
def state():
    return torch.get_num_threads(), timm.layers.is_fast_norm(), cudnn.allow_tf32, cudnn.conv.fp32_precision
torch.set_num_threads(3)  # none of these is what anyone would want, so whoever chooses is seen
timm.layers.set_fast_norm(not timm.layers.is_fast_norm())
cudnn.allow_tf32 = not cudnn.allow_tf32
before = state()
for name in [name for name in sys.modules if name.partition(".")[0] == "moe_bsr"]:
    del sys.modules[name]
def refuse(*_):
    raise AssertionError("a C library was opened")
ctypes.CDLL = refuse
import moe_bsr, moe_bsr.training.trainer, moe_bsr.runs.load
assert state() == before
"""


def test_importing_changes_nothing():
    done = fresh.run(IMPORT_ANEW)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("bare", "no_mallopt")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_loading_leave_the_process_as_it_was(tmp_path, precision):
    config = make_config(tmp_path, train__steps=2, runtime__threads=2, runtime__precision=precision)
    before = process_state()
    assert before[0] != 2
    moe_bsr.train(config, tmp_path / "run")
    assert process_state() == before
    loaded = moe_bsr.load(tmp_path / "run")
    assert process_state() == before and loaded.runtime.threads == 2
    index = int(loaded.data("shapes").test.index[0])
    loaded.predict(loaded.data("shapes").test.source.image(index))
    assert process_state() == before


@pytest.mark.usefixtures("no_mallopt")
def test_preparing_changes_nothing():
    before = process_state()
    assert prepare(RuntimeConfig(device="cpu", threads=3)).threads == 3
    assert prepare(RuntimeConfig(device="cpu")).threads == torch.get_num_threads()
    assert process_state() == before


def test_threads_and_float32_convolutions_are_set_only_during_a_run():
    before, convolutions = process_state(), torch.backends.cudnn.conv
    with pytest.raises(KeyError), Runtime(torch.device("cuda"), "fp32", 2, "").in_effect():
        assert torch.get_num_threads() == 2 and convolutions.fp32_precision == "ieee"
        raise KeyError
    assert process_state() == before
    with Runtime(torch.device("cpu"), "fp32", 1, "").autocast():
        assert convolutions.fp32_precision == "ieee" and not torch.is_autocast_enabled("cpu")
    with Runtime(torch.device("cpu"), "bf16", 1, "").autocast():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert convolutions.fp32_precision == before[6]
    assert process_state() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's own arithmetic")
def test_a_patch_embedding_in_float32_is_exact_to_float32():
    layer, images = nn.Conv2d(3, 192, 16, 16).cuda(), torch.randn(8, 3, 224, 224, device="cuda")
    expected = torch.nn.functional.conv2d(images.double(), layer.weight.double(), layer.bias.double(), 16)
    with exact_convolutions(), torch.no_grad():
        error = (layer(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_fast_norms_are_set_only_in_the_placed_model():
    """With bf16 on CUDA, timm's norm layers must return bf16. Other models in the process stay unchanged."""

    class Model(nn.Sequential):
        def cast_frozen_(self, dtype: torch.dtype) -> None:
            pass

        def to(self, device: torch.device):
            return self

    model, other = Model(timm.layers.LayerNorm(4), nn.LayerNorm(4)), timm.layers.LayerNorm(4)
    CUDA_BF16.place(model)
    assert model[0]._fast_norm and not other._fast_norm and not timm.layers.is_fast_norm()
    Runtime(torch.device("cuda"), "fp32", 1, "").place(model)
    assert not model[0]._fast_norm


def test_tune_process_sets_the_allocator_and_threads(monkeypatch):
    calls, threads = [], torch.get_num_threads()
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append("malloc"))
    tune_process()
    assert calls == ["malloc"] and torch.get_num_threads() == threads
    try:
        tune_process(threads + 1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_the_allocator_is_not_set_without_glibc(monkeypatch):
    def absent(name: str):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    allocator.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("opened"))
    allocator.keep_freed_memory()


def test_a_missing_device_is_refused():
    with pytest.raises(ConfigError, match="runtime.device = 'cuda:99'"):
        prepare(RuntimeConfig(device="cuda:99"))


@pytest.mark.parametrize("device", ["meta", "mkldnn", "hpu", "nothing", ""])
def test_an_unsupported_device_is_refused(device):
    with pytest.raises(ConfigError, match=f"runtime.device = '{device}'"):
        prepare(RuntimeConfig(device=device))


@pytest.mark.parametrize("threads", [most_threads() + 1, 10_000, 10**13])
def test_too_many_threads_are_refused(threads):
    with pytest.raises(ConfigError, match=f"runtime.threads = {threads}: "):
        prepare(RuntimeConfig(device="cpu", threads=threads))
    assert prepare(RuntimeConfig(device="cpu", threads=most_threads())).threads == most_threads() >= 64
