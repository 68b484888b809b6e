"""Provenance of a result: the command, the code and the machine."""

import shutil
import subprocess
import sys

import pytest

from moe_bsr.runtime import cpu_features, provenance


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        (["/venv/bin/python", "/venv/bin/moe-bsr", "train", "a b.yaml"], "moe-bsr train 'a b.yaml'"),
        (["/venv/bin/python", "-m", "moe_bsr", "cost"], "python -m moe_bsr cost"),
        (["python3", "tools/train.py", "x.yaml", "train.steps=3"], "python tools/train.py x.yaml train.steps=3"),
        (["python"], None),
    ],
)
def test_the_command_is_given_as_typed(monkeypatch, started, typed):
    monkeypatch.setattr(sys, "orig_argv", started)
    assert provenance.command() == typed


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_code_and_marked_if_files_differ(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit() -> str | None:
        provenance.commit.cache_clear()
        return provenance.commit()

    monkeypatch.setattr(provenance, "CODE", tmp_path)
    monkeypatch.setattr(provenance.importlib.metadata, "version", lambda name: "9.9")
    assert commit() == "9.9"  # no checkout: the installed version
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    git("tag", "v1")
    whole = git("rev-parse", "HEAD")
    assert commit() == whole
    (tmp_path / "code.py").write_text("2")
    assert provenance.commit() == whole  # cached: the code that was imported
    assert commit() == f"{whole}-dirty"
    monkeypatch.setattr(provenance.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert commit() == "9.9"

    def unknown(name: str):
        raise provenance.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.importlib.metadata, "version", unknown)
    assert commit() is None
    provenance.commit.cache_clear()


X86 = "processor : 0\nvendor_id : AuthenticAMD\nmodel name : AMD EPYC\nflags : fpu avx2 avx512f avx512_bf16\n\n"
ARM = "processor : 0\nFeatures : fp asimd bf16\n"


@pytest.mark.parametrize(
    ("text", "flags", "bf16", "slow"),
    [
        (X86 + X86.replace("AMD EPYC", "other"), ["avx2", "avx512f", "avx512_bf16"], "avx512_bf16", True),
        (X86.replace("AuthenticAMD", "GenuineIntel") + "flags: amx_bf16", ["avx2", "avx512f", "avx512_bf16"],
         "avx512_bf16", False),
        (ARM, ["asimd", "bf16"], None, False),
        (None, [], None, False),
    ],
)  # fmt: skip
def test_cpu_features_are_read_from_proc_cpuinfo(tmp_path, monkeypatch, text, flags, bf16, slow):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(cpu_features, "Path", lambda name: file)
    cpu_features._cpuinfo.cache_clear()
    try:
        assert cpu_features.decisive_flags() == flags
        assert cpu_features.bf16_instructions() == bf16 and cpu_features.mkl_is_slow() == slow
        assert cpu_features.name() and (cpu_features.name() == "AMD EPYC") == (text is not None and text != ARM)
    finally:
        monkeypatch.undo()
        cpu_features._cpuinfo.cache_clear()
