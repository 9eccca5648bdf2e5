import pickle
from pathlib import Path

import pytest
import yaml

from storyanchors.vlm import VlmConfig
from storyanchors.vlm.config import BACKENDS, read_key

SETTINGS = Path(__file__).parents[3] / "conf" / "vlm"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"backend": "claude"}, "vlm.backend is 'claude', expected one of gemini"),
        ({"backend": "openai", "base_url": "http://x/v1"}, "vlm.model=... is missing"),
        ({"backend": "openai", "model": "m"}, "vlm.base_url=... is missing"),
        ({"backend": "gemini", "model": "m"}, "vlm.api_key_env=... is missing"),
        ({"backend": "replay"}, "vlm.replay=... is missing"),
        ({"backend": "scripted", "json_mode": "guided"}, "vlm.json_mode is 'guided'"),
        ({"backend": "scripted", "media_resolution": "tiny"}, "vlm.media_resolution is 'tiny'"),
        ({"backend": "scripted", "timeout_s": 0}, "vlm.timeout_s is 0, expected above 0"),
        ({"backend": "scripted", "temperature": -1}, "vlm.temperature is -1"),
        ({"backend": "scripted", "input_usd_per_million": 1}, "vlm.price_date"),
        ({"backend": "openai", "model": "m", "base_url": "localhost:8000"}, "expected http://"),
    ],
)
def test_a_config_that_cannot_work_is_an_error(settings, problem):
    with pytest.raises(ValueError, match=problem):
        VlmConfig(**settings)


@pytest.mark.parametrize("url", ["http://me:SECRET@x/v1", "http://x/v1?key=SECRET"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="api_key_env") as error:
        VlmConfig("openai", "m", base_url=url)
    assert "SECRET" not in str(error.value)


def test_the_key_comes_from_the_environment_and_is_not_in_the_config(monkeypatch):
    monkeypatch.setenv("MY_KEY", " sk-MARKED\n")
    config = VlmConfig("openai", "m", base_url="http://x/v1", api_key_env="MY_KEY")
    assert read_key(config) == "sk-MARKED"
    assert "MARKED" not in repr(config) and b"MARKED" not in pickle.dumps(config)


@pytest.mark.parametrize("key", ["", "  ", "sk-MARKED\nx", "sk-MARKED\u00e9", "sk MARKED"])
def test_what_cannot_be_a_key_is_an_error_that_does_not_show_it(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="MY_KEY") as error:
        read_key(VlmConfig("openai", "m", base_url="http://x/v1", api_key_env="MY_KEY"))
    assert "MARKED" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_settings_that_need_only_what_is_one_s_own(backend):
    settings = yaml.safe_load((SETTINGS / f"{backend}.yaml").read_text())
    own = {
        "openai": {"model": "m", "base_url": "http://x/v1"},
        "local": {"model": "m"},
        "replay": {"replay": "f"},
    }
    assert VlmConfig(**settings, **own.get(backend, {})).backend == backend
    assert len(list(SETTINGS.glob("*.yaml"))) == len(BACKENDS)
