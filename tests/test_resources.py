"""Warnings and errors of `moe_bsr.train` about too little memory or disk space, before training starts."""

import shutil

import pytest
from tiny_runs import make_config, make_trainer

import moe_bsr
from moe_bsr.config import ConfigError
from moe_bsr.runs import checkpoint
from moe_bsr.runtime import memory


def test_only_a_run_that_may_not_fit_into_memory_gets_a_warning(tmp_path, monkeypatch, recwarn):
    config = make_config(tmp_path, train__steps=1, train__evaluate_test=False)
    moe_bsr.train(config, tmp_path / "fits", callbacks=[])
    assert not [each for each in recwarn if "memory" in str(each.message)]
    monkeypatch.setattr(memory, "available", lambda device: (3 * 2**20, "this machine"))
    with pytest.warns(
        UserWarning, match="may run out of memory: .* this machine has 3 MB free; lower train.batch_size"
    ):
        assert moe_bsr.train(config, tmp_path / "tight", callbacks=[])["status"] == "finished"


def test_a_model_whose_parameters_do_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (2**20, "this machine"))
    with pytest.raises(ConfigError, match="parameters alone take 2 MB, and this machine has 1 MB free; take a smaller"):
        moe_bsr.train(make_config(tmp_path), tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run").exists()


def test_too_little_disk_space_for_checkpoints_is_an_error_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda run: shutil._ntuple_diskusage(0, 0, 2**20))
    with pytest.raises(ConfigError, match="no room for the run's checkpoints: 3 of 3.2 MB each need 9.5 MB, 1.0 MB"):
        moe_bsr.train(make_config(tmp_path), tmp_path / "run", callbacks=[])
    assert not (tmp_path / "run").exists()


def test_checkpoint_sizes_are_predicted(tmp_path):
    config = make_config(tmp_path, train__steps=2, train__ema_decay=0.5, train__evaluate_test=False)
    trainer = make_trainer(config, tmp_path / "run")
    predicted = trainer.state.sizes()
    trainer.fit()
    for name, size in predicted.items():
        written = (tmp_path / "run" / "checkpoint" / "2" / f"{name}.safetensors").stat().st_size
        assert size == pytest.approx(written, rel=0.03)
