"""Records of a run: one is there when it is whole, and says so when it is not."""

from pathlib import Path

import pytest
import torch

from minisp.errors import OutputError
from minisp.store.names import ANY
from minisp.store.records import Folder


def test_a_record_exists_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    value = torch.randn(5, 3).to(torch.bfloat16)
    with folder.writing("states_0001", note="x") as append:
        append("0", value)
        append("1", value[:0])
        append("2", torch.tensor(7))
    with pytest.raises(RuntimeError), folder.writing("states_0002") as append:
        append("0", value)
        raise RuntimeError
    folder.settle()
    assert folder.names(ANY) == ["states_0001"] and not folder.has("states_0002")
    again = Folder(tmp_path)
    assert again.keys("states_0001") == ["0", "1", "2"] and again.facts("states_0001") == {"note": "x"}
    assert torch.equal(again.read("states_0001", "0"), value) and int(again.read("states_0001", "2")) == 7
    assert again.read("states_0001", "1").shape == (0, 3)
    (tmp_path / "states_0001.data").write_bytes(b"\0" * (tmp_path / "states_0001.data").stat().st_size)
    with pytest.raises(OutputError, match="expected 0 as it was written, got other bytes"):
        again.read("states_0001", "0")
    assert not again.intact("states_0001")
