"""An option, from the lines of a TOML file to the value that the server reads."""

from pathlib import Path
from tempfile import TemporaryDirectory

from brlite.config.load import load_config
from tests.journeys.recorder import Journey, record


def journey() -> Journey:
    with TemporaryDirectory() as folder:
        file = Path(folder, "brlite.toml")
        file.write_text("[limits]\nmax_waiting = 3\n", encoding="utf-8")
        load_config(file)  # msgspec reads the structs' annotations once
        with record() as recorded:
            config = load_config(file)
    assert config.limits.max_waiting == 3
    return recorded


def test_an_option_is_read_in_few_calls():
    option = journey()

    assert len(option.calls) <= 18
    assert len(option.files) <= 4
