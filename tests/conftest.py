import pytest
import torch
from hypothesis import settings

from nanochat.multimodal_gpt import MultimodalGPTConfig, create_multimodal_gpt

settings.register_profile("shared-machine", deadline=None)  # a busy machine is no bug
settings.load_profile("shared-machine")
torch.set_num_threads(1)  # small tensors: a second thread only waits

TINY = dict(sequence_len=64, vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vision_embedding_dim=12)


def make_model(**changes):
    """A small MultimodalGPT in which every weight matters: a new one's head and residual outputs are all zero."""
    model = create_multimodal_gpt(MultimodalGPTConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def model():
    return make_model()
