"""The coordinator and the sites as NVFlare runs them; imported by its processes alone.

A job carries the configuration as text and no code: server and sites run the slidetl that is installed. The
server starts a message at a site and asks from time to time whether it is done, so a site that dies in the
middle of a training is noticed within a minute, and a training may last days.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.context import get_call_context, set_call_context

from slidetl.errors import FederationError, SlidetlError, UsageError
from slidetl.federation.config import Federation, federation_from
from slidetl.federation.coordinator import describe, run_rounds
from slidetl.federation.encryption import CIPHERTEXT_BYTES, Cipher, count_ciphertexts
from slidetl.federation.engine import KEYS_OF_SERVER, KEYS_OF_SITES, OUTCOME, RESULT, SAYS, read_site
from slidetl.federation.participant import Answer, Participant
from slidetl.federation.records import only_job
from slidetl.federation.site import initial_weights, site_slides
from slidetl.federation.weights import Weights
from slidetl.files import write_whole
from slidetl.processor import prepare_for_networks
from slidetl.text import one_line

_LOG = logging.getLogger(__name__)
MESSAGES = (
    *("hello", "train", "decrypt", "validate", "keep"),
    *("begin", "train_own", "mix", "combine", "take", "validate_own", "keep_own"),
)
_CALL_SECONDS = 20.0  # of a short call; one to a site that has died takes it whole
_SLOWEST = 500_000.0  # bytes per second, of a call that moves a network
_LOST_SECONDS = 60.0  # without a sign of life
_POLL_SECONDS = (0.1, 3.0)  # first and longest pause between questions


class Server:
    """Runs the rounds on the server.

    Args:
        federation: JSON of :meth:`~slidetl.federation.config.Federation.to_dict`.
        output: folder for the rounds, on the server.
    """

    def __init__(self, federation: str, output: str) -> None:
        self.federation = federation
        self.output = output

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Runs the rounds, and writes their outcome or the error that ended them."""
        output = Path(self.output)
        try:
            prepare_for_networks()
            federation = federation_from(json.loads(self.federation))
            outcome = run_rounds(
                federation,
                _ConnectedSites(federation),
                output,
                lambda account: _LOG.info(f"{SAYS}{describe(account, federation.rounds)}"),
                _read_cipher(federation, KEYS_OF_SERVER),
            )
        except SlidetlError as error:
            outcome = {"error": one_line(str(error))}
        except BaseException as error:  # the command that waits reads the reason from this file alone
            write_whole(
                output / OUTCOME, json.dumps({"error": f"{type(error).__name__}: {one_line(str(error))}"})
            )
            raise
        write_whole(output / OUTCOME, json.dumps(outcome))
        _LOG.info(f"{SAYS}{RESULT}{json.dumps(outcome)}")


class Client:
    """Answers for a site.

    Args:
        federation: as for :class:`Server`.
    """

    def __init__(self, federation: str) -> None:
        self.federation = federation
        self._participant: Participant | None = None
        self._lock = threading.Lock()
        self._answers: dict[str, Answer | None] = {}  # by token; None while it is computed
        self._log: Path | None = None  # known with the places of the site
        self._held = ExitStack()

    @collab.publish  # type: ignore[untyped-decorator]
    def start(self, token: str, message: str, arguments: dict[str, Any]) -> bool:
        """Starts to compute the answer to a message of the server."""
        if collab.caller != "server" or message not in MESSAGES:
            return False
        self._answers = {token: None}  # the server waits for the latest alone
        context = get_call_context()
        threading.Thread(
            target=self._compute, args=(context, token, message, arguments), daemon=True, name="slidetl"
        ).start()
        return True

    @collab.publish  # type: ignore[untyped-decorator]
    def is_done(self, token: str) -> bool:
        """Tells if an answer is there."""
        return self._answers.get(token, {}) is not None

    @collab.publish  # type: ignore[untyped-decorator]
    def collect(self, token: str) -> Answer:
        """Hands an answer to the server."""
        if collab.caller != "server":
            return {"failed": "Refused"}
        answer = self._answers.pop(token, None)
        return {"failed": "Restarted"} if answer is None else answer

    @collab.publish  # type: ignore[untyped-decorator]
    def give(self, number: int, what: str) -> Answer:
        """Gives another site an update or network, peer to peer; never the server."""
        participant = self._participant
        if collab.caller == "server" or participant is None:
            return {"failed": "Refused"}
        if participant.federation.scheme != "peer_to_peer":
            return {"failed": "Refused"}
        return participant.give(number, what)

    def _compute(self, context: Any, token: str, message: str, arguments: dict[str, Any]) -> None:
        set_call_context(context)
        try:
            with self._lock:
                if self._participant is None:
                    self._participant = self._join(collab.site_name)
            answer = getattr(self._participant, message)(**arguments)
        except Exception as error:  # its text stays here
            self._note(error)
            answer = {"failed": type(error).__name__}
        if token in self._answers:
            self._answers[token] = answer

    def _join(self, name: str) -> Participant:
        prepare_for_networks()
        federation = federation_from(json.loads(self.federation))
        site, folder = read_site(name, federation)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "site.log"
        with ExitStack() as held:
            held.enter_context(only_job(folder))
            federation.sites[name] = site
            participant = Participant(federation, name, site_slides(federation, site), folder)
            participant.note = self._note
            participant.cipher = _read_cipher(federation, KEYS_OF_SITES)
            if federation.scheme == "peer_to_peer":
                seconds = _seconds(_bytes(initial_weights(federation)))
                participant.ask = _PeerCalls(federation.peer_to_peer.secure, seconds).ask
            self._held = held.pop_all()  # until this process of the job ends
        return participant

    def _note(self, error: Exception) -> None:
        """Writes an error to the site's own log: NVFlare's may be sent to the server."""
        if self._log is None:
            traceback.print_exception(error)
            return
        text = "".join(traceback.format_exception(error))
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class _PeerCalls:
    """Calls of a site to other sites."""

    def __init__(self, secure: bool, seconds: float) -> None:
        self._wanted, self._seconds = secure, seconds

    def ask(self, name: str, number: int, what: str) -> Answer:
        """Asks a site for its update or network; encrypted for that site where NVFlare has certificates."""
        try:
            found = collab.get_clients([name])(timeout=self._seconds, secure=self._secure()).give(
                number, what
            )
            return dict(dict(found)[name])
        except Exception as error:  # any: of the network, of the other site
            raise FederationError(f"{name} has not answered: {type(error).__name__}") from error

    def _secure(self) -> bool:
        return self._wanted and not os.environ.get("SLIDETL_SIMULATED")


class _ConnectedSites:
    """Carries messages to the sites that are connected with the server."""

    def __init__(self, federation: Federation) -> None:
        self._patience = federation.answer_seconds
        self._number = 0
        weights = initial_weights(federation)
        encrypted = CIPHERTEXT_BYTES * count_ciphertexts(weights) * federation.averaged.encrypted
        self._move_seconds = _seconds(_bytes(weights) + encrypted)
        self._silent: set[str] = set()  # asked in vain

    def ask(
        self, names: Sequence[str], message: str, **arguments: Any
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Starts the message at all sites, and waits for their answers."""
        self._number += 1
        token = f"{os.getpid()}-{self._number}"
        connected = {client.name for client in collab.clients}
        lost = {name: "is not connected" for name in names if name not in connected}
        back, _ = self._call([name for name in names if name in self._silent], "is_done", 5.0, token="")
        self._silent -= back.keys()
        lost |= {name: "is gone" for name in names if name in self._silent}
        started, failed = self._call(
            [name for name in names if name not in lost],
            "start",
            self._move_seconds,
            token=token,
            message=message,
            arguments=arguments,
        )
        lost |= dict.fromkeys(failed, "does not answer")
        lost |= {
            name: "has refused the message" for name, accepted in started.items() if accepted is not True
        }
        seen = dict.fromkeys(
            (name for name, accepted in started.items() if accepted is True), time.monotonic()
        )
        begun, pause = time.monotonic(), _POLL_SECONDS[0]
        answers: dict[str, Answer] = {}
        while seen:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
            states, _ = self._call(list(seen), "is_done", _CALL_SECONDS, token=token)
            done = [name for name, state in states.items() if state is True]
            if done:
                found, failed = self._call(done, "collect", self._move_seconds, token=token)
                answers |= found
                lost |= dict.fromkeys(failed, "broke off its answer")
            now = time.monotonic()
            for name in list(seen):
                if name in done:
                    del seen[name]
                elif name in states:
                    seen[name] = now
                elif now - seen[name] > _LOST_SECONDS:
                    lost[name] = f"no sign of life for {_LOST_SECONDS:.0f} s"
                    del seen[name]
            if now - begun > self._patience:
                lost |= dict.fromkeys(seen, f"late: no answer within {self._patience:g} s")
                break
        self._silent |= lost.keys()
        return answers, lost

    @staticmethod
    def _call(
        names: Sequence[str], method: str, seconds: float, **arguments: Any
    ) -> tuple[dict[str, Any], list[str]]:
        if not names:
            return {}, []
        group = collab.get_clients(list(names))(timeout=seconds)
        results = getattr(group, method)(**arguments)
        return dict(results), list(results.failures)


def _bytes(weights: Weights) -> int:
    return sum(value.nbytes for value in weights.values())


def _seconds(moved: int) -> float:
    """Returns the longest time for a call that moves so many bytes."""
    return 2 * _CALL_SECONDS + moved / _SLOWEST


def _read_cipher(federation: Federation, file: str) -> Cipher | None:
    """Reads the keys of this process from its kit; None without encryption.

    Raises:
        UsageError: the kit has none, they are changed, or others may read the secret one.
    """
    if not federation.averaged.encrypted:
        return None
    from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace
    from nvflare.fuel.sec.security_content_service import SecurityContentService

    try:
        context = load_tenseal_context_from_workspace(file, collab.fl_ctx)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"averaged.encrypted needs the keys of slidetl's kits ({error}): make kits by "
            "'python -m slidetl.federation.provision'"
        ) from error
    path = Path(SecurityContentService.security_content_manager.content_folder) / file
    if context.is_private() and path.stat().st_mode & 0o077:
        raise UsageError(f"{path}: others may read the secret key of the sites; chmod 600 {path}")
    return Cipher(context)
