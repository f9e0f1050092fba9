"""Tests of configuration files: writing and reading back, refusals."""

import pytest

from dave_fast.cli.config import Config, load_config, save_config
from dave_fast.errors import InputError


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config("demo"),
        Config('a "quoted" \\ model\n\x7f é', 0.25, 7),
        Config(None, 0.0),
        Config(None, 1e-9),
        Config(shrink=False),
    ],
)
def test_written_and_read_back(tmp_path, config):
    save_config(config, tmp_path / "c.toml")
    assert load_config(tmp_path / "c.toml") == config


def test_integers_stand_for_floats(tmp_path):
    (tmp_path / "c.toml").write_text("noise_alpha = 0\n")
    alpha = load_config(tmp_path / "c.toml").noise_alpha
    assert alpha == 0 and isinstance(alpha, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha = 1", "has the key 'alpha'; expected only 'model', 'noise_alpha', 'n_samples'"),
        ("n_samples = true", "'n_samples' is True"),
        ("n_samples = 1.5", "'n_samples' is 1.5; expected int"),
        ("n_samples = 0", "'n_samples' is 0"),
        ("noise_alpha = 1.5", "'noise_alpha' is 1.5"),
        ("noise_alpha = nan", "'noise_alpha' is nan"),
        ("shrink = 1", "'shrink' is 1; expected bool"),
        ("model = 3", "'model' is 3; expected str"),
        ("model", "is no TOML file"),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.toml")
    assert message in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.toml")
