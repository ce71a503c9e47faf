"""Instructions for Meta-World's 50 tasks (Yu et al. 2019, arXiv 1910.10897): four paraphrases each.

Names are Meta-World's without the version: "push" is its "push-v3". Colours are those in the camera image; balls mark goals.
"""

import difflib
from collections.abc import Iterable, Sequence

from nanochat.errors import UserError

# fmt: off
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "assembly": (
        "put the ring onto the red peg", "take the ring's green handle and peg the ring",
        "slip the ring over the upright peg", "lower the ring until the peg is inside it"),
    "basketball": (
        "drop the basketball through the hoop", "score a basket with the orange ball",
        "lift the ball and dunk it in the basket", "carry the basketball to the hoop"),
    "bin-picking": (
        "move the block from the red bin to the blue", "lift the block out of red and into blue",
        "transfer the small block to the blue bin", "fill the blue bin with the red bin's block"),
    "box-close": (
        "close the box with its lid", "lay the lid on the box",
        "pick up the lid and cover the box", "cover the open box"),
    "button-press": (
        "press the red button from the front", "push the button straight into the box's face",
        "poke the front button all the way in", "drive the button forward into its box"),
    "button-press-topdown": (
        "press the red button down from above", "push down the button on top of the box",
        "come from above and press the button", "lower the hand onto the top button"),
    "button-press-topdown-wall": (
        "press the button down from above, behind the wall", "reach over the wall and push the top button down",
        "pass the wall and press the button from above", "lower the hand onto the button past the wall"),
    "button-press-wall": (
        "press the front button behind the wall", "go around the wall and push the button in",
        "get past the wall and press the button forward", "poke the button that the wall shields"),
    "coffee-button": (
        "press the button of the coffee machine", "start the coffee machine with its button",
        "push the coffee machine's button in", "switch the coffee maker on"),
    "coffee-pull": (
        "pull the mug away from the coffee machine", "take the mug out from under the coffee machine",
        "drag the coffee mug back to the goal", "bring the mug back from the coffee maker"),
    "coffee-push": (
        "push the mug under the coffee machine", "place the mug below the coffee spout",
        "slide the coffee mug up to the machine", "move the mug forward to the coffee maker"),
    "dial-turn": (
        "turn the dial halfway round", "rotate the dial with the fingers",
        "give the dial half a turn", "twist the round knob on the table"),
    "disassemble": (
        "lift the ring off the red peg", "pull the ring up until it leaves the peg",
        "take the ring by its handle and unpeg it", "raise the ring from the upright peg"),
    "door-close": (
        "close the door of the cabinet", "push the open door shut",
        "swing the cabinet door closed", "shut the door with the hand"),
    "door-lock": (
        "lock the door by turning the latch down", "turn the door's latch to locked",
        "rotate the lock downwards on the door", "bolt the closed door"),
    "door-open": (
        "open the door by its handle", "pull the door handle until it stands open",
        "swing the cabinet door open", "draw the shut door wide open"),
    "door-unlock": (
        "unlock the door by turning the latch up", "turn the door's latch to unlocked",
        "rotate the lock upwards on the door", "release the bolt of the door"),
    "drawer-close": (
        "close the green drawer", "push the open drawer shut",
        "shove the drawer back into its chest", "shut the drawer all the way"),
    "drawer-open": (
        "open the green drawer", "pull the drawer out by its handle",
        "draw the drawer out of its chest", "grab the handle and open the drawer"),
    "faucet-close": (
        "turn the faucet handle to close it", "shut the tap off",
        "swing the faucet's handle to the closed side", "stop the water at the faucet"),
    "faucet-open": (
        "turn the faucet handle to open it", "turn the tap on",
        "swing the faucet's handle to the open side", "let the water run from the faucet"),
    "hammer": (
        "hammer the nail into the box", "pick up the hammer and hit the nail",
        "drive the nail in with the hammer", "knock the nail in, using the red hammer"),
    "hand-insert": (
        "put the hand with the block into the hole", "grip the block and sink it into the hole",
        "carry the block down into the table's hole", "insert the held block in the hole below"),
    "handle-press": (
        "press the handle down from the front", "push the handle on the box's front down",
        "force the front handle all the way down", "lower the handle that faces the robot"),
    "handle-press-side": (
        "press the sideways handle down", "push down the handle on the box's side",
        "force the side handle all the way down", "lower the handle that sticks out sideways"),
    "handle-pull": (
        "pull the handle up from the front", "raise the handle on the box's front",
        "lift the front handle all the way up", "hook the handle that faces the robot and raise it"),
    "handle-pull-side": (
        "pull the sideways handle up", "raise the handle on the box's side",
        "lift the side handle all the way up", "raise the red handle that sticks out sideways"),
    "lever-pull": (
        "pull the lever up", "swing the lever's blue knob upwards",
        "raise the lever until it stands upright", "lift the arm of the lever"),
    "peg-insert-side": (
        "insert the green peg into the hole sideways", "put the long peg in the box's side hole",
        "pick up the green peg and plug the hole", "slide the peg into the side of the box"),
    "peg-unplug-side": (
        "unplug the peg from the box sideways", "pull the plug out of the side hole",
        "take hold of the peg and draw it out", "remove the peg from the side of the box"),
    "pick-out-of-hole": (
        "pick the block out of the hole", "reach into the hole and fetch the block",
        "lift the sunken red block to the blue ball", "get the block from the hole to the goal"),
    "pick-place": (
        "pick up the puck, bring it to the blue ball", "lift the red puck to the blue goal",
        "carry the puck through the air to the blue ball", "grasp the puck and hold it at the blue goal"),
    "pick-place-wall": (
        "lift the puck over the wall to the blue ball", "carry the puck across the wall to the blue goal",
        "pick up the puck and pass it over the wall", "place the puck at the blue ball behind the wall"),
    "plate-slide": (
        "slide the plate forward into the goal", "push the black plate ahead into the net",
        "shoot the plate forward, away from the robot", "score by sliding the plate straight ahead"),
    "plate-slide-back": (
        "slide the plate back out of the goal", "drag the plate from the net towards the robot",
        "pull the black plate back out of the net", "bring the plate back from the goal, straight"),
    "plate-slide-back-side": (
        "slide the plate sideways out of the goal", "drag the plate from the net to the side",
        "move the black plate out of the net sideways", "get the plate out of the goal to one side"),
    "plate-slide-side": (
        "slide the plate sideways into the goal", "push the black plate to the side into the net",
        "shoot the plate sideways at the net", "score by sliding the plate to one side"),
    "push": (
        "push the puck to the green ball", "slide the puck over the table to the green goal",
        "move the puck along the table to the green ball", "shove the puck forward to the green goal"),
    "push-back": (
        "push the block back to the green ball", "pull the block back towards the robot",
        "drag the brown block to the near green goal", "move the block backwards to the green ball"),
    "push-wall": (
        "push the puck around the wall to the green ball", "slide the puck past the wall to the green goal",
        "shove the red puck behind the wall", "steer the puck by the wall to the green ball"),
    "reach": (
        "move the hand to the red ball", "reach for the red ball",
        "bring the empty gripper to the red goal", "touch the red ball, leave the puck alone"),
    "reach-wall": (
        "move the hand over the wall to the red ball", "reach across the wall for the red ball",
        "bring the gripper past the wall to the red goal", "touch the red ball by the wall"),
    "shelf-place": (
        "put the blue block on the shelf", "pick up the blue block and shelve it",
        "lift the block onto the wooden shelf", "store the block at the shelf's green ball"),
    "soccer": (
        "push the football into the goal", "score a goal with the football",
        "roll the football into the blue net", "shoot the white ball at the soccer goal"),
    "stick-pull": (
        "pull the flask with the stick", "grasp the stick and hook the flask back",
        "use the stick to drag the flask to the goal", "put the stick in the flask's handle and pull"),
    "stick-push": (
        "push the flask with the stick", "grasp the stick and shove the flask away",
        "use the stick to move the flask forward", "hold the stick against the flask and push"),
    "sweep": (
        "sweep the block off to the table's side", "brush the brown block sideways off the table",
        "sweep the block to the edge of the table", "clear the block away from the table"),
    "sweep-into": (
        "sweep the block into the hole", "brush the brown block into the table's hole",
        "push the block along until it drops in the hole", "sweep the block to the blue ball and in"),
    "window-close": (
        "slide the window closed", "push the window shut by its handle",
        "move the window's handle to the closed side", "shut the sliding window"),
    "window-open": (
        "slide the window open", "push the window's handle until it is open",
        "move the window's handle to the open side", "open up the sliding window"),
}

# The first object of the observation. The reaching tasks have one too, which must not be touched.
OBJECTS: dict[str, str] = {
    "assembly": "the ring", "basketball": "the basketball", "bin-picking": "the block", "box-close": "the lid",
    "button-press": "the button", "button-press-topdown": "the button", "button-press-topdown-wall": "the button",
    "button-press-wall": "the button", "coffee-button": "the coffee button", "coffee-pull": "the mug",
    "coffee-push": "the mug", "dial-turn": "the dial", "disassemble": "the ring", "door-close": "the door handle",
    "door-lock": "the lock", "door-open": "the door handle", "door-unlock": "the lock",
    "drawer-close": "the drawer handle", "drawer-open": "the drawer handle", "faucet-close": "the faucet handle",
    "faucet-open": "the faucet handle", "hammer": "the hammer", "hand-insert": "the block",
    "handle-press": "the handle", "handle-press-side": "the handle", "handle-pull": "the handle",
    "handle-pull-side": "the handle", "lever-pull": "the lever", "peg-insert-side": "the peg",
    "peg-unplug-side": "the plug", "pick-out-of-hole": "the block", "pick-place": "the puck",
    "pick-place-wall": "the puck", "plate-slide": "the plate", "plate-slide-back": "the plate",
    "plate-slide-back-side": "the plate", "plate-slide-side": "the plate", "push": "the puck", "push-back": "the block",
    "push-wall": "the puck", "reach": "the puck", "reach-wall": "the puck", "shelf-place": "the block",
    "soccer": "the football", "stick-pull": "the stick", "stick-push": "the stick", "sweep": "the block",
    "sweep-into": "the block", "window-close": "the window handle", "window-open": "the window handle",
}

# Difficulty by Seo et al. 2022 (Masked World Models, arXiv 2206.14244): published success rates group the tasks like this.
TIERS: dict[str, tuple[str, ...]] = {
    "easy": (
        "button-press", "button-press-topdown", "button-press-topdown-wall", "button-press-wall", "coffee-button",
        "dial-turn", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open",
        "faucet-close", "faucet-open", "handle-press", "handle-press-side", "handle-pull", "handle-pull-side",
        "lever-pull", "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "reach",
        "reach-wall", "window-close", "window-open", "peg-unplug-side"),
    "medium": (
        "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side",
        "push-wall", "soccer", "sweep", "sweep-into"),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very hard": ("shelf-place", "disassemble", "stick-pull", "stick-push", "pick-place-wall"),
}

# Tasks whose scenes show the same things: in one of them, the instruction of another can be followed, or nearly so.
SHARED_SCENES: tuple[tuple[str, ...], ...] = (
    ("reach", "push", "pick-place", "push-back", "reach-wall", "push-wall", "pick-place-wall", "shelf-place", "soccer"),
    ("sweep", "sweep-into", "hand-insert", "pick-out-of-hole"), ("peg-insert-side", "peg-unplug-side"),
    ("assembly", "disassemble"), ("stick-push", "stick-pull"), ("coffee-button", "coffee-pull", "coffee-push"),
    ("button-press", "button-press-wall", "button-press-topdown", "button-press-topdown-wall"),
    ("door-open", "door-close", "door-lock", "door-unlock"), ("drawer-open", "drawer-close"),
    ("faucet-open", "faucet-close"), ("window-open", "window-close"),
    ("handle-press", "handle-press-side", "handle-pull", "handle-pull-side"),
    ("plate-slide", "plate-slide-back", "plate-slide-side", "plate-slide-back-side"),
)

MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close",
)
# fmt: on

SETS = {"mt10": MT10, "mt50": tuple(sorted(INSTRUCTIONS))}
ACCEPTED = f"expected mt10, mt50 or task names: {', '.join(SETS['mt50'])}"


def tasks_elsewhere(task: str, tasks: Iterable[str]) -> list[str]:
    """Those of `tasks` whose scenes differ from that of `task`, so that their instructions make no sense in it."""
    alike = next((scene for scene in SHARED_SCENES if task in scene), (task,))
    return [other for other in tasks if other not in alike]


def task_list(names: Sequence[str]) -> list[str]:
    """The names of the tasks, each once, in the order of their first mention.

    names: of tasks ("push", "push-v3") or sets ("mt10", "mt50"), in upper or lower case.

    Raises:
        ValueError: there are no names, or an unknown one; the message suggests similar names.
    """
    if not names:
        raise UserError(f"no tasks: {ACCEPTED}")
    found: dict[str, None] = {}
    for name in names:
        key = name.strip().lower().removesuffix("-v3")
        if key not in SETS and key not in INSTRUCTIONS:
            near = difflib.get_close_matches(key, [*SETS, *INSTRUCTIONS], n=3)
            hint = f", did you mean {' or '.join(near)}?" if near else ";"
            raise UserError(f"there is no task {name!r}{hint} {ACCEPTED}")
        found |= dict.fromkeys(SETS.get(key, (key,)))
    return list(found)
