"""The robot's side of openpi's protocol: a connection to a policy server. No torch.

`openpi-client` works with our server too, but it has neither a time limit nor a close(), and it wants numpy below 2, which
lerobot 0.6 does not; this client needs numpy, msgpack and websockets.
"""

from contextlib import ExitStack

import numpy as np
from msgpack import packb
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import connect

from nanochat.errors import UserError
from nanochat.serving.openpi import MAX_MESSAGE, pack_array, unpack


class ServerGone(UserError):
    """The server cannot be reached, or did not answer in time. It may come back: connect again."""


class PolicyClient:
    """A connection to a policy server.

    address: such as ws://192.168.1.20:8000; "ws://" may be left out. token: what the server was started with. timeout_s: the
    longest wait for the connection, and for an answer.

    Raises ServerGone where no server answers, UserError for an address that is none and for a wrong token.
    """

    def __init__(self, address: str, token: str | None = None, timeout_s: float = 5.0):
        self.address, self.timeout_s = address if "://" in address else f"ws://{address}", timeout_s
        self.opened = ExitStack()
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        try:
            opening = connect(
                self.address, compression=None, max_size=MAX_MESSAGE, additional_headers=headers, open_timeout=timeout_s,
                close_timeout=1,
            )  # fmt: skip
            self.connection = self.opened.enter_context(opening)
        except InvalidStatus as error:
            if error.response.status_code == 401:
                raise UserError(
                    f"{self.address} wants a token: give the one of its --token or $NANOCHAT_TOKEN"
                ) from error
            raise ServerGone(f"{self.address} refused the connection: HTTP {error.response.status_code}") from error
        except (InvalidURI, ValueError) as error:
            raise UserError(f"{address} is no address of a server, such as ws://127.0.0.1:8000") from error
        except (OSError, InvalidHandshake, WebSocketException) as error:  # OSError: also a time-out
            raise ServerGone(
                f"no policy server answers at {self.address}: nanochat policy-server starts one"
            ) from error
        self.metadata: dict = unpack(self.receive())

    def infer(self, observation: dict) -> np.ndarray:
        """An observation, see `policy.read_observation` -> the chunk of actions, (n, action_dim) float32.

        Raises ServerGone where no answer comes in time, and UserError with the server's words where it refuses the observation.
        """
        try:
            self.connection.send(packb(observation, default=pack_array))
        except WebSocketException as error:
            raise self.gone(error) from error
        answer = self.receive()
        if isinstance(answer, str):
            raise UserError(f"the policy server refused the observation: {answer}")
        actions = unpack(answer).get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise UserError(f"{self.address} answered without actions: it is no policy server of this protocol")
        return actions

    def receive(self) -> bytes | str:
        try:
            return self.connection.recv(timeout=self.timeout_s)
        except TimeoutError as error:
            self.close()  # or its late answer would be taken for that to the next observation
            raise ServerGone(f"{self.address} did not answer within {self.timeout_s:g} s") from error
        except WebSocketException as error:
            raise self.gone(error) from error

    def gone(self, error: WebSocketException) -> ServerGone:
        return ServerGone(f"{self.address} closed the connection ({error})")

    def close(self) -> None:
        self.opened.close()
