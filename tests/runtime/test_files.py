"""Text files: the old text or the new one, whatever happens."""

from pathlib import Path

import pytest

from moe_bsr.runtime.files import write_whole


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_whole(file, "first")
    write_whole(file, "second")
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]

    def rename(*_):
        raise OSError("crash")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="crash"):
        write_whole(file, "third, half wri")
    assert file.read_text() == "second"
