"""A policy behind the HTTP server: one observation as JSON, and openpi's websocket on the same port."""

import json

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("websockets")
import httpx

from nanochat.cli.serve import PolicyFlags, safe_policy
from nanochat.metaworld.simulator import Scene
from nanochat.serving import simulation
from nanochat.serving.client import PolicyClient
from nanochat.serving.policy import SafePolicy
from tests.serving import data_uri, make_agent, running


class Arm:
    """Actions that follow from the picture and the state."""

    metadata = {"chunk": 2, "action_dim": 2, "state_dim": 2, "targets": "absolute", "cameras": []}
    action_range = ([-1.0, -1.0], [1.0, 1.0])

    def act(self, images, states, instructions):
        assert instructions == ["open the door"]
        return np.stack([states, [[images[0][0, 0, 0] / 255, images[0][0, 0, 2] / 255]]], 1).astype(np.float32)


@pytest.fixture(scope="module")
def address():
    async def run(function):
        return function()

    with running({"tiny": make_agent()}, policy=SafePolicy(Arm(), max_change=0.5), run=run) as found:
        yield found


def observation(**changes):
    whole = {"observation/image": data_uri("red"), "observation/state": [0.5, 0.0], "prompt": "open the door"}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def test_one_observation_as_json(http):
    answer = http.post("/act", json=observation())
    assert answer.json()["actions"] == [[0.5, 0.0], [1.0, 0.0]] and answer.json()["server_timing"]["infer_ms"] >= 0
    assert http.get("/policy").json()["action_dim"] == 2


def test_a_session_limits_changes_from_one_request_to_the_next(http):
    first = http.post("/act", json=observation(session="left arm")).json()["actions"]
    second = http.post("/act", json=observation(session="left arm", **{"observation/state": [0.0, 0.9]})).json()[
        "actions"
    ]
    assert first[-1] == [1.0, 0.0] and second[0] == [0.5, 0.5]
    other = http.post("/act", json=observation(session="right arm", **{"observation/state": [0.0, 0.9]})).json()[
        "actions"
    ]
    assert other[0] == pytest.approx([0.0, 0.9])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observation/image": None}, "observation/image"),
        ({"observation/image": "!"}, "observation/image: expected a data URI"),
        ({"observation/image": [1]}, "observation/image"),
        ({"observation/state": [1]}, "must be 2 finite numbers"),
        ({"observation/state": ["a", "b"]}, "must be 2 finite numbers"),
        ({"prompt": None}, "prompt"),
        ({"session": 5}, "session must be a text"),
    ],
)
def test_a_wrong_observation(http, changes, words):
    answer = http.post("/act", json=observation(**changes))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_openpis_protocol_on_the_same_port(address):
    for path in ("", "/policy"):
        client = PolicyClient(address.replace("http", "ws") + path)
        image = np.zeros((4, 4, 3), np.uint8)
        actions = client.infer(
            {"observation/image": image, "observation/state": [0.25, 0.0], "prompt": "open the door"}
        )
        np.testing.assert_array_equal(actions, np.array([[0.25, 0.0], [0.0, 0.0]], np.float32))
        client.close()


def test_a_server_without_a_policy_says_so():
    with running({"tiny": make_agent()}) as address, httpx.Client(base_url=address) as http:
        answer = http.post("/act", json=observation())
        assert answer.status_code == 503 and "nanochat serve robot" in answer.json()["error"]["message"]


class Sawyer:
    """Succeeds after seven steps."""

    def __init__(self, task, image_size, cameras):
        self.cameras, self.steps, self.shape = cameras, 0, (image_size, image_size, 3)

    def reset(self, seed):
        return Scene(np.array([0, 0.6, 0.2, 1], np.float32), np.zeros(39, np.float32), False, False)

    def step(self, action):
        assert action.shape == (4,)
        self.steps += 1
        return Scene(np.array([0, 0.6, 0.2, 1], np.float32), np.zeros(39, np.float32), self.steps == 7, False)

    def images(self):
        return {camera: np.zeros(self.shape, np.uint8) for camera in self.cameras}

    def close(self):
        pass


class Driver(Arm):
    metadata = {"chunk": 10, "action_dim": 4, "state_dim": 4, "targets": "relative", "cameras": [], "image_size": 16}
    action_range = ([-1.0] * 4, [1.0] * 4)

    def act(self, images, states, instructions):
        assert images[0].shape == (16, 16, 3) and instructions == ["shut it"]
        return np.full((1, 10, 4), 0.5, np.float32)


def test_the_arm_of_the_page_drives_until_success(monkeypatch):
    monkeypatch.setattr(simulation, "Arm", Sawyer)
    monkeypatch.setattr(simulation, "is_installed", lambda: True)

    async def run(function):
        return function()

    with running({}, policy=SafePolicy(Driver()), run=run) as address, httpx.Client(base_url=address) as http:
        assert http.get("/page-settings").json()["simulates"] is True
        assert {"name": "door-open", "instruction": "open the door by its handle"} in http.get("/simulator").json()[
            "tasks"
        ]
        lines = http.post("/simulator", json={"task": "door-close", "instruction": "shut it"}).text.splitlines()
        frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [(frame["step"], frame["success"]) for frame in frames] == [(0, False), (5, False), (7, True)]
        assert (
            np.shape(frames[0]["path"]) == (6, 2)
            and frames[0]["actions"][0] == [0.5] * 4
            and frames[2]["actions"] == []
        )
        assert http.post("/simulator", json={"task": "juggle"}).status_code == 404


def test_a_policy_of_another_robot_is_not_simulated(http):
    assert http.get("/page-settings").json()["simulates"] is False and http.get("/simulator").status_code == 404


def test_the_flags_of_a_policy(capsys):
    policy = safe_policy(Arm(), PolicyFlags(execute=1))
    assert policy.execute == 1 and "replaced by the previous action (--hold last)" in capsys.readouterr().out


def test_the_command_serves_what_its_flags_say(nanochat, monkeypatch, tmp_path):
    from nanochat.serving import http as module

    served = []
    monkeypatch.setattr(module, "serve", lambda app, *where: served.append((app, *where)))
    key = tmp_path / "key"
    key.write_text("sesame\n")
    out, err = nanochat("serve", "shapes", "robot", "--port", "0", "--api-key", key)
    app, *where = served[0]
    assert where == ["127.0.0.1", 0, None, None] and app.entrance.api_key == "sesame" and app.entrance.local
    assert "actions are relative" in out and "warning" not in err
    assert "set a key" in nanochat("serve", "shapes", "--host", "0.0.0.0").err
    assert "two checkpoints are called shapes" in nanochat("serve", "shapes", "shapes", code=2).err
    assert "belong together" in nanochat("serve", "--ssl-certfile", key, code=2).err
    assert "no certificate" in nanochat("serve", "--ssl-certfile", key, "--ssl-keyfile", key, code=2).err
    assert "is no folder" in nanochat("serve", "--media-path", key, code=2).err
    assert nanochat("serve", "--max-rows", 0, code=2).err == "error: --max-rows must be above 0, got 0\n"
