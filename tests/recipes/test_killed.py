"""A build that is killed at any moment and started again ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import killed
from tests.recipes.test_build import RECIPE, write

# MINISP_KILLS=20 kills at twenty moments, in a few minutes.
KILLS = int(os.environ.get("MINISP_KILLS", "6"))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe", RECIPE.replace("{to: padded}", "{to: padded}, {to: gguf, dtype: f16}"))
    command = [sys.executable, killed.__file__, str(recipe), str(tmp_path / "builds"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["killed"]) == KILLS and found["same"] == [True] * KILLS
