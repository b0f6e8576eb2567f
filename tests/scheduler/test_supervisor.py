from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.config import ServeConfig
from scheduler.core import CoreConfig
from scheduler.supervisor import Supervisor

DEMO = Path(__file__).parents[2] / "demo" / "model"


def test_whoever_callers_wait_for_is_back_before_their_windows_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it was killed: a window has 30 s by default."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = ServeConfig(
        core=CoreConfig(), model=str(DEMO), served_model_name="m", port=0, frontends=2, journal=str(tmp_path / "journal")
    )
    supervisor = Supervisor(config)
    try:
        waited_for = [child for child in supervisor._children if child.role in ("core", "frontend")]
        assert len(waited_for) == 3 and all(child.may_restart and max(child.back_off_s) <= 2 for child in waited_for)
    finally:
        supervisor._port.close()
        supervisor._inner.remove()
