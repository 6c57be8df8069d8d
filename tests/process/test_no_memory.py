"""A server that the system gives too little memory ends unready, in one line and with a status."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE


@pytest.mark.model
@pytest.mark.parametrize("megabytes", [300, 400, 500])
def test_a_server_without_memory_for_its_model_ends_in_one_line(
    megabytes: int, tmp_path: Path, smollm2_path: Path
) -> None:
    limit = megabytes * 2**20  # the model's KV cache alone takes 755 MB

    result = subprocess.run(
        [BRLITE, "serve", "--port", "0", "--model", str(smollm2_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )

    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    own = "OpenBLAS error: "  # numpy's library ends the process itself
    assert result.stderr.splitlines()[-1].startswith(("brlite: error: ", own))
