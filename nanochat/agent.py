"""Pictures and text in, text and actions out: a checkpoint behind one small interface.

agent = Agent.load("robot")
seen = agent.look("frame.png")                        # encode once,
"".join(agent.ask("is the gripper open?", seen))      # ask often
agent.act([frame], [state], ["open the door"])        # (1, chunk, action_dim)
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from nanochat.beams import beam_search, beam_search_all
from nanochat.cameras import by_camera
from nanochat.conversation import CAPTION_PROMPT, action_message, render, user_message
from nanochat.engine import Cache, Engine
from nanochat.errors import NotTrained, TooManyPictures, UserError
from nanochat.sampling import Sampling
from nanochat.tokenizer import StreamDecoder

DEFAULT_NEW_TOKENS = 64
LEARNT = ("questions", "captions", "actions")
PLACE = re.compile(r"<image>|<\|image\|>")  # in a question: a picture stands here


class Agent:
    """training: training.json of the checkpoint, how the model was made."""

    def __init__(self, model, tokenizer, training: dict | None = None):
        self.model, self.tokenizer, self.training = model, tokenizer, training or {}
        self.stop_ids = (tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>"))
        self.places_per_image = getattr(model.config, "places_per_image", 0)

    @classmethod
    def load(cls, name: str = "photos", device="cpu", runtime: str = "auto") -> "Agent":
        """A checkpoint folder, a model that ships ("photos", "photos-yolo", "shapes", "robot") or a hub name, which run on torch;
        or a folder of `nanochat export`, which runs on ONNX Runtime, on the CPU. runtime: "torch" or "onnx" refuse the other
        kind. Raises CheckpointError for one that is damaged, missing or of a newer format.

        device: for torch: auto, cpu, cuda or cuda:N, or a torch.device."""
        from nanochat.onnx.folder import is_export, open_export

        exported = is_export(name)
        if runtime == "torch" and exported:
            raise UserError(
                f"{name} was exported for ONNX Runtime: name the checkpoint it was made from, or leave the runtime at auto"
            )
        if runtime == "onnx" and not exported:
            raise UserError(
                f"{name} is no exported model: nanochat export {name} FOLDER makes one, then name that folder"
            )
        if exported:
            return cls(*open_export(name))
        from nanochat.checkpoint import load_checkpoint
        from nanochat.devices import pick_device

        return cls(*load_checkpoint(name, pick_device(device) if isinstance(device, str) else device))

    @property
    def multi_turn(self) -> bool:
        """Whether the model was trained on conversations of several turns."""
        return self.training.get("multi_turn", False)

    @property
    def learnt(self) -> dict[str, bool]:
        """What the model was trained for: "questions" about pictures, "captions" (answers to `CAPTION_PROMPT`), "actions"."""
        return learnt_by(self.training)

    @property
    def images_learnt(self) -> int:
        """The most pictures in one conversation of the training data; 1 where training.json does not say it ("images")."""
        found = self.training.get("images")
        return found if isinstance(found, int) and found > 1 else 1

    def check_images(self, n: int) -> None:
        """Raises TooManyPictures for more in one question than the model was ever trained on."""
        if n > self.images_learnt:
            most = "one picture" if self.images_learnt == 1 else f"up to {self.images_learnt} pictures"
            raise TooManyPictures(
                f"{n} pictures in one question, but this model has learnt questions about {most} only: ask about each of them "
                "alone"
            )

    def check_learnt(self, question: str) -> None:
        """Raises NotTrained for a question of a kind that the model was never trained to answer: what it says would be noise."""
        caption = PLACE.sub("", question).strip() == CAPTION_PROMPT
        wanted = "captions" if caption else "questions"
        if self.learnt[wanted]:
            return
        does = {"questions": "answers questions", "captions": "describes pictures", "actions": "acts"}
        can = [text for name, text in does.items() if self.learnt[name]]
        lacks = "to describe pictures" if caption else "to answer questions about pictures"
        raise NotTrained(
            f"this model was not trained {lacks}; it {' and '.join(can) or 'has learnt nothing yet'}: choose another model"
        )

    def look(self, images):
        """One picture or a list of n -> (n, N, D) float32 vision vectors, to index and to pass on. Raises ValueError for a text
        model, ImageError for what is not a picture."""
        if not self.places_per_image:
            raise UserError("this checkpoint is a text model: it cannot look at pictures")
        return self.model.look(images)

    # ---- answers

    def ask(
        self,
        question: str,
        vectors=None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        beams: int = 1,
    ) -> Iterator[str]:
        """Stream the answer to one question about the pictures behind `vectors` (n, N, D), in whole characters.

        question: the pictures stand before it, or where it has <image> (or <|image|>), see `question_message`.
        beams: 1 takes the likeliest token at each step; more search for the likeliest answer (`beams.beam_search`), which then
        comes in one piece.

        Raises ValueError for a question that does not fit the context, for one of a kind that the model never learnt to answer
        (see `learnt`), for more pictures than it learnt (see `images_learnt`), and for beams with a temperature.
        """
        n_images = 0 if vectors is None else len(vectors)
        self.check_learnt(question)
        self.check_images(n_images)
        ids = self.prompt([question_message(question, n_images)])
        self.check_fits(ids, n_images, max_new_tokens)
        if beams == 1:
            return self.answer(ids, vectors, max_new_tokens, sampling)
        if sampling is not None and (sampling.temperature > 0 or sampling.repetition_penalty != 1):
            raise UserError(
                "beam search looks for the likeliest answer, so it has no temperature and no repetition penalty: leave out "
                "either them or the beams"
            )
        images = vectors if n_images else None
        tokens = beam_search(
            self.model, ids, self.room(len(ids), max_new_tokens), beams=beams, stop_ids=self.stop_ids, images=images
        )
        return self.text(iter(tokens))

    def check_fits(self, ids: list[int], n_images: int, max_new_tokens: int | None) -> None:
        """Raises TooManyPictures for several that do not fit the context together. One is the engine's to check."""
        context, new = self.model.config.sequence_len, 1 if max_new_tokens is None else max_new_tokens
        if n_images > 1 and len(ids) + new > context:
            each = self.places_per_image
            raise TooManyPictures(
                f"{n_images} pictures of {each} tokens each, {len(ids) - n_images * each} tokens of text and {new} of the "
                f"answer do not fit the context of {context} tokens: show fewer pictures, or ask about each of them alone"
            )

    def room(self, n_read: int, max_new_tokens: int | None) -> int:
        """How many tokens an answer may have after n_read others: as many as fit, where the caller names no number. Where none
        fits, the engine says why."""
        if max_new_tokens is not None:
            return max_new_tokens
        return max(1, min(DEFAULT_NEW_TOKENS, self.model.config.sequence_len - n_read))

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        return render(self.tokenizer, messages, self.places_per_image, for_completion=True).ids

    def answer(
        self,
        ids: list[int],
        vectors=None,
        max_new_tokens: int | None = None,
        sampling=None,
        cache: Cache | None = None,
    ) -> Iterator[str]:
        """Stream the text that follows the tokens `ids`. cache: holds what comes before them."""
        max_new_tokens = self.room(len(ids) + (cache.longest if cache is not None else 0), max_new_tokens)
        images = None if vectors is None or not len(vectors) else [vectors]
        steps = Engine(self.model).stream(
            [ids], max_new_tokens, sampling=sampling, stop_ids=self.stop_ids, images=images, cache=cache
        )
        return self.text(said[0] for said in steps)

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for token in tokens:
            yield decoder.feed(token)
        yield decoder.flush()

    def answer_all(
        self,
        conversations: Sequence[Sequence[dict]],
        vectors: Sequence,
        max_new_tokens: int,
        beams: int = 1,
    ) -> list[str]:
        """The likeliest answers to many conversations at once: greedy, or found by beam search with more than one beam.
        vectors: (n_i, N, D) for each, with 0 pictures (0, N, D)."""
        prompts = [self.prompt(messages) for messages in conversations]
        images = [seen if len(seen) else None for seen in vectors]
        if beams == 1:
            rows = Engine(self.model).generate(prompts, max_new_tokens, images=images, stop_ids=self.stop_ids)
        else:
            rows = beam_search_all(
                self.model, prompts, max_new_tokens, beams=beams, stop_ids=self.stop_ids, images=images
            )
        return [self.tokenizer.decode(row).strip() for row in rows]

    # ---- actions

    def check_can_act(self) -> None:
        """Raises ValueError for a model without an action head."""
        if not hasattr(self.model, "act"):
            raise UserError(
                f"this checkpoint is a {type(self.model).__name__} without an action head, so it cannot act: "
                "train a policy with nanochat train robot"
            )

    @property
    def metadata(self) -> dict:
        """What clients of a policy need to know."""
        self.check_can_act()
        config = self.model.config
        return {
            "action_head": config.action_head,
            "chunk": config.chunk,
            "action_dim": config.action_dim,
            "state_dim": config.state_dim,  # 0: the policy reads no state
            "state_range": self.state_range,  # low and high of each number in the training data
            "action_range": self.action_range,  # low and high of each number that the server sends
            "targets": config.targets,  # relative or absolute
            # of the network: differences from the last action, from the state, or none; what it answers is as `targets` says
            "predict": "last" if config.previous else "delta" if config.deltas else "absolute",
            "committed": config.most_committed,  # so many actions of a chunk may be given
            "previous": config.previous,  # so many actions before are read, see `previous_actions`; 0: none
            "image_size": config.vision_image_size,
            "cameras": config.cameras,  # in order; empty for one camera without a name
            "camera_dropout": config.camera_dropout,  # above 0: a camera may be missing
            "state_names": config.state_names,  # empty where the data names none
            "action_names": config.action_names,
            "units": config.units,  # empty if unknown
            "fps": config.fps,  # actions per second; 0 if unknown
        }

    @property
    def state_range(self) -> tuple[list[float], list[float]]:
        """The range of each number of the state in the training data, in physical units; empty lists for a policy without one.
        States far outside are refused, see `actions.check_states`."""
        self.check_can_act()
        trained = self.model.trained_states
        return ([], []) if trained is None else (trained.low, trained.high)

    @property
    def action_range(self) -> tuple[list[float], list[float]]:
        """The 1st and the 99th percentile of each action dimension in the training data, in physical units."""
        self.check_can_act()
        return self.model.action_scale.low, self.model.action_scale.high

    def act(
        self,
        images: Sequence,
        states: np.ndarray | None,
        instructions: Sequence[str],
        committed: np.ndarray | None = None,
        previous: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """What B robots see, (B, state_dim) states, B instructions -> (B, chunk, action_dim) float32, all in physical units.

        images: for each robot a dict camera -> picture, or the picture alone where there is one camera. None instead of all
        pictures masks them, as training masks some (blind). A single camera may be missing or None only if the policy was
        trained with --camera-dropout. states: None for a policy that reads no state (state_dim 0). committed: (B, d, action_dim)
        the actions that will be carried out anyway, d up to `metadata["committed"]`: the chunks begin with them and continue
        them. previous: for each robot the last actions that it was sent, (k, action_dim) from the oldest on, the last
        `metadata["previous"]` of them; (0, action_dim) where there were none.

        Nothing is clipped: send actions through `safety.SafeActions` before anything moves. Raises ValueError for numbers or
        shapes that do not match, for a camera that is missing or unknown, for states far outside of the training data's range
        (another unit), and for a model that cannot act; ImageError for what is not a picture.
        """
        self.check_can_act()
        config = self.model.config
        rows = [by_camera(shown, config.cameras, config.camera_dropout > 0) for shown in images]
        prompts = [self.prompt([action_message(text, config.n_cameras)]) for text in instructions]
        return self.model.act(prompts, self.model.look_around(rows), states, committed, previous)


class Chat:
    """A conversation of many turns about the same pictures.

    A model that was trained on conversations (`Agent.multi_turn`) reads the earlier turns with each question; where they leave
    too little of the context, the older half of them is dropped. A model that was trained on single questions gets each
    question as if it were the first: earlier turns would only mislead it.

    Either way the key/value cache is kept and rewound to where the new prompt differs from it: a turn costs its own tokens, and
    the pictures are read once.
    """

    def __init__(self, agent: Agent, vectors=None):
        """vectors: (n, N, D) of the pictures. Raises UserError for more of them than the model learnt."""
        agent.check_images(0 if vectors is None else len(vectors))
        self.agent, self.cache = agent, Engine(agent.model).new_cache()
        self.vectors = vectors if vectors is not None and len(vectors) else None
        self.turns: list[tuple[str, str]] = []  # (question, answer), those that are remembered
        self.read: list[int] = []  # begins with the tokens that the cache holds

    def say(self, question: str, max_new_tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the answer to the next turn. An interrupted answer (Ctrl-C) is not remembered.

        The pictures stand before the first question, or where that has <image>. Raises ValueError for a question that does not
        fit the context even alone, and for an <image> in a later one.
        """
        agent, turns = self.agent, self.turns
        agent.check_learnt(question)
        ids = self.prompt(turns, question)
        # an answer of unknown length gets at least a quarter of the context
        context = agent.model.config.sequence_len
        wanted = min(DEFAULT_NEW_TOKENS, context // 4) if max_new_tokens is None else max_new_tokens
        while turns and len(ids) + wanted > context:
            turns = turns[(len(turns) + 1) // 2 :]  # half, so that the next turns need not be read again
            ids = self.prompt(turns, question)
        # the last token is always read, since the answer follows from its logits
        kept = n_common(self.read[: self.cache.lengths[0]], ids[:-1])
        self.cache.rewind([kept])
        self.read, answer = ids, []
        for piece in agent.answer(ids[kept:], self.unread(ids[:kept]), max_new_tokens, sampling, self.cache):
            answer.append(piece)
            yield piece
        if agent.multi_turn:
            self.turns = [*turns, (question, "".join(answer))]

    def unread(self, kept: list[int]):
        """The vectors of the pictures that are not among the tokens which the cache keeps."""
        if self.vectors is None:
            return None
        return self.vectors[kept.count(self.agent.model.config.vision_token_id) // self.agent.places_per_image :]

    def prompt(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        messages, n_images = [], 0 if self.vectors is None else len(self.vectors)
        for asked, answered in [*turns, (question, "")]:
            messages += [
                question_message(asked, 0 if messages else n_images),
                {"role": "assistant", "content": answered},
            ]
        return self.agent.prompt(messages[:-1])


def question_message(question: str, n_images: int) -> dict:
    """The user's message about n_images pictures. They stand where the question has <image> or <|image|>, as in the data of
    LLaVA, or before it if it has neither. Raises UserError where it has another number of them."""
    texts = [text.strip() for text in PLACE.split(question)]
    if len(texts) == 1:
        return user_message(question, n_images)
    if len(texts) - 1 != n_images:
        raise UserError(
            f"the question has {len(texts) - 1} x <image>, and there are {n_images} pictures to stand there: write one "
            "<image> for each picture, or none to show them before the question"
        )
    parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
    return {"role": "user", "content": [part for part in parts if part.get("text") != ""]}


def learnt_by(training: dict) -> dict[str, bool]:
    """What training.json says that the model learnt: {"questions", "captions", "actions"} -> bool. Older ones do not say it: then
    it follows from the recipes of the run and of those before it; a recipe that can be either counts as both."""
    if training.get("learnt"):
        return {name: bool(training["learnt"].get(name)) for name in LEARNT}
    recipe = training.get("recipe") or {}
    asked = bool(recipe.get("questions_per_step", 1) and recipe.get("question_loss", 1))
    by_recipe = {
        "easy_vqa": {"questions"}, "daquar": {"questions"}, "flickr8k": {"captions"}, "upstream": {"questions"},
        "robot": {"actions", "questions", "captions"} if asked else {"actions"},
    }  # fmt: skip
    runs = [training, *training.get("earlier", [])]
    found = [by_recipe.get(str(run.get("recipe_name")), set(LEARNT)) for run in runs]
    return {name: any(name in learnt for learnt in found) for name in LEARNT}


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token rows."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
