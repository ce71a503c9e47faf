"""A small untrained policy for tests."""

from dataclasses import asdict, replace

import torch

from nanochat.actions import ACT, BINS, STATE, Scale
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.vision import YOLOv9Plus


def random_model(kind, config):
    """A text or vision model in which every parameter counts: none is zero, as some are at first."""
    torch.manual_seed(0)
    model = kind(config)
    model.init_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_tokenizer(texts: list[str], vocab_size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.add_special_tokens([STATE, ACT, *BINS])
    return tokenizer


def make_policy(tokenizer: Tokenizer, state_dim: int = 4, image_size: int = 64, sequence_len: int = 96) -> RobotGPT:
    """Chunks of 3 actions of 4 numbers. Random weights everywhere: those that are initialised to zero would make every
    answer and every action the same."""
    torch.manual_seed(0)
    config = RobotGPTConfig(
        sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32,
        vision_embedding_dim=16, map_channels=32, vision_tokens_per_image=4, vision_layer="2",
        vision_image_size=image_size, vision_token_id=tokenizer.special("<|image|>"), action_head="continuous", chunk=3,
        state_scale=asdict(Scale([0.0] * state_dim, [1.0] * state_dim)), action_scale=asdict(Scale([-1.0] * 4, [1.0] * 4)),
        state_token_id=tokenizer.special(STATE), act_token_id=tokenizer.special(ACT),
        bin_token_id=tokenizer.special(BINS[0]),
    )  # fmt: skip
    model = random_weights(config)
    model.attach_encoder(YOLOv9Plus("yolov9t.yaml", image_size=image_size).truncate("2"))
    return model.eval()


def policy_like(policy: RobotGPT, **fields) -> RobotGPT:
    """A policy with other fields in its config, weights of its own, and the same encoder."""
    torch.manual_seed(1)
    model = random_weights(replace(policy.config, **fields))
    model.attach_encoder(policy.vision_encoder)
    return model.eval()


def random_weights(config: RobotGPTConfig) -> RobotGPT:
    model = RobotGPT(config)
    model.init_weights()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model
