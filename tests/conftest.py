import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt

settings.register_profile("shared-machine", deadline=None)  # a busy machine is no bug
settings.load_profile("shared-machine")
torch.set_num_threads(1)  # small tensors: a second thread only waits

# Real weights and photographs, which are not ours to ship: tests that want them are skipped where they are not named.
REAL_WEIGHTS = Path(os.environ.get("NANOCHAT_TEST_WEIGHTS", "no-weights.pt")).absolute()
REAL_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", "no-data")).absolute()  # with daquar/ and flickr8k/ in it
needs_weights = pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason="NANOCHAT_TEST_WEIGHTS names no YOLOv9 .pt file")
needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="NANOCHAT_TEST_DATA names no folder")

TINY = dict(sequence_len=64, vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vision_embedding_dim=12)


def make_model(**changes):
    """A small MultimodalGPT in which every weight matters: a new one's head and residual outputs are all zero."""
    model = create_multimodal_gpt(MultimodalGPTConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_tests(tmp_path_factory):
    """No test writes to the user's cache, or finds anything in it. Processes that tests start inherit it."""
    os.environ["NANOCHAT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def nanochat(monkeypatch, capsys):
    """A function that runs a command in this process and returns (stdout, stderr). code: the exit code that it must have."""
    from nanochat.cli import main as cli

    def call(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["nanochat", *map(str, words)])
        if code:
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == code
        else:
            cli.main()
        return capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def client(address):
    """OpenAI's client of the server at `address`, which the module starts."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(address):
    import httpx

    with httpx.Client(base_url=address, timeout=20) as found:
        yield found
