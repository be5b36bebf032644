"""How agent and supervisor prove to each other that they belong to the same run.

Both read the run's secret from a file that only this user may read (`link/secret.py`). Neither
sends it. Each side picks a fresh random number, a *nonce*, and proves that it knows the secret by
the HMAC-SHA256 of everything that the two have agreed on:

    agent                                                          supervisor
      |  {"link": 1, "node": N, "nonce": A}                            |
      | -------------------------------------------------------------> |
      |           {"nonce": S, "leader": L, "proof": P("supervisor")}  |
      | <------------------------------------------------------------- |
      |  {"proof": P("agent")}                                         |
      | -------------------------------------------------------------> |
      |                                             {"welcome": true}  |
      | <------------------------------------------------------------- |

    P(role) = HMAC(secret, ["opt_train link", version, role, N, L, A, S])

Who proves what to whom. The supervisor goes first: an agent obeys (it would kill its ranks), so it
sends nothing but its name before it knows whom it obeys. Then the agent proves that it is of the
run. That it is node N and no other node of the run is its claim: all agents share one secret, and
one that lied would be one of our own programs.

Why two nonces. A proof over the peer's nonce alone could be had by passing the challenge on; one
over the own nonce alone could be played back. With both in it, each proof holds for this one
conversation: a recording of an earlier handshake is worth nothing, to either side.

Why a role. Without it the supervisor's proof, sent back to it as it came, would serve as the
agent's. The first word of the list does the same between protocols: transfers of snapshots between
agents use the same secret (`agent/snapshots/transfer.py`), and no proof of the one is one of the
other. A JSON list keeps the parts apart: no two different lists have the same bytes.

Why the leader's number. It is proved, so that nobody can make an agent believe in a newer
supervisor; an agent that has followed number 5 refuses 4, which was succeeded and does not know it.

What an attacker on the network sees, where the endpoint is TCP: everything but the secret: names of
nodes, metrics, log lines, commands. Lines are not encrypted, and after the handshake not signed
one by one: who can rewrite packets between two of our hosts can take over an open connection. The
handshake keeps out whoever can merely connect. Bind to the cluster's own network (invariant 13).

The comparison takes the same time whatever differs (`hmac.compare_digest`), so that a proof cannot
be guessed letter by letter.
"""

import hmac
import json
import re
import secrets
from typing import Any

from opt_train.link.connection import Connection, LinkRefused
from opt_train.protocol.framing import ProtocolError, parse

HANDSHAKE_SECONDS = 5.0
"""Longest wait for one line of a peer that has not proved itself."""
NODE_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
NONCE_FORM = re.compile(r"[0-9a-f]{64}")
VERSION = 1
"""Of the handshake. Ends that differ in it do not understand each other."""


async def prove_agent(connection: Connection, secret: bytes, node: str, least_leader: int) -> None:
    """Prove this end to be the agent of `node`, after the supervisor has proved itself.

    Raises:
        LinkRefused: the supervisor does not know the secret, or leads with a number below
            `least_leader`.
    """
    agent_nonce = make_nonce()
    connection.send({"link": VERSION, "node": node, "nonce": agent_nonce})
    challenge = await receive_object(connection)
    supervisor_nonce, leader = _text(challenge, "nonce"), challenge.get("leader")
    if type(leader) is not int:
        raise LinkRefused("the supervisor sent no number to lead with")
    agreed = (node, leader, agent_nonce, supervisor_nonce)
    if not is_same(_proof(secret, "supervisor", *agreed), challenge.get("proof")):
        raise LinkRefused("the supervisor does not know this run's secret")
    # Behind the proof: anybody can claim a number.
    if leader < least_leader:
        raise LinkRefused(f"supervisor {leader} has been succeeded by {least_leader}")
    connection.send({"proof": _proof(secret, "agent", *agreed)})
    if (await receive_object(connection)).get("welcome") is not True:
        raise LinkRefused("the supervisor did not take our proof")
    connection.trust(node, leader)


async def prove_supervisor(connection: Connection, secret: bytes, leader: int) -> None:
    """Prove this end to be supervisor `leader`, and have the agent prove itself: after this,
    `connection.node` is who dialled in.

    Raises:
        LinkRefused: the peer does not know the secret, or does not speak this protocol.
    """
    greeting = await receive_object(connection)
    if greeting.get("link") != VERSION:
        raise LinkRefused("the peer does not speak this link's version")
    node, agent_nonce = _text(greeting, "node"), _text(greeting, "nonce")
    if not NODE_FORM.fullmatch(node) or not NONCE_FORM.fullmatch(agent_nonce):
        raise LinkRefused("the peer's name or nonce is malformed")
    supervisor_nonce = make_nonce()
    agreed = (node, leader, agent_nonce, supervisor_nonce)
    proof = _proof(secret, "supervisor", *agreed)
    connection.send({"nonce": supervisor_nonce, "leader": leader, "proof": proof})
    answer = await receive_object(connection)
    if not is_same(_proof(secret, "agent", *agreed), answer.get("proof")):
        raise LinkRefused(f"whoever claims to be {node} does not know this run's secret")
    connection.send({"welcome": True})
    connection.trust(node, leader)


def make_nonce() -> str:
    """64 hexadecimal digits that nobody has seen before."""
    return secrets.token_hex(32)


def prove(secret: bytes, *parts: Any) -> str:
    """The HMAC-SHA256 of `parts`, as a JSON list; the first one names the protocol."""
    return hmac.new(secret, json.dumps(parts).encode(), "sha256").hexdigest()


def is_same(proof: str, claimed: Any) -> bool:
    """Whether a peer's claim is this very proof, whatever it has sent in its place."""
    # compare_digest raises for a text that is not ASCII.
    return isinstance(claimed, str) and claimed.isascii() and hmac.compare_digest(proof, claimed)


async def receive_object(connection: Connection) -> dict[str, Any]:
    """The next line of a peer that has not proved itself yet. Raises `LinkRefused`."""
    try:
        return parse(await connection.receive_line(HANDSHAKE_SECONDS))
    except ProtocolError as error:
        raise LinkRefused(str(error)) from None


def _proof(
    secret: bytes, role: str, node: str, leader: int, agent_nonce: str, supervisor_nonce: str
) -> str:
    return prove(
        secret, "opt_train link", VERSION, role, node, leader, agent_nonce, supervisor_nonce
    )


def _text(payload: dict[str, Any], key: str) -> str:
    value = payload.get(key)
    if not isinstance(value, str) or not value.isascii():
        raise LinkRefused(f"the handshake's {key!r} is missing or malformed")
    return value
