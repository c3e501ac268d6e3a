"""The mailbox of foreign apps: order, patience with a slow client, and waits of any length."""

from __future__ import annotations

import math
import threading
import time

import pytest
from flwr.app import Message, RecordDict

from fl_sim.communication.flower_private import identified, set_message_id
from fl_sim.runtime.apps.mailbox import POLLED_S, Letter, Mailbox


def letter(number: int, node: int, ttl: float = 60.0) -> Letter:
    with identified(7):
        message = Message(RecordDict(), node, "train", ttl=ttl)
    set_message_id(message, str(number))
    return Letter(number, 0, message, 0)


def reply(to: Letter) -> Message:
    return Message(RecordDict(), reply_to=to.message)


def test_a_nodes_letters_wait_for_each_other_and_other_nodes_do_not() -> None:
    box, letters = Mailbox(), [letter(1, 10), letter(2, 10), letter(3, 11)]
    box.put(letters)
    first, other = box.take(), box.take()
    assert (first, other) == (letters[0], letters[2])
    box.close()
    assert box.take() is None, "the second letter waits for its node"
    box.finish(letters[0], reply(letters[0]))
    assert box.take() is letters[1]


@pytest.mark.parametrize("seconds", [1e10, 1e300, math.inf])
def test_a_wait_may_be_longer_than_a_timer(seconds: float) -> None:
    box, one = Mailbox(), letter(1, 10, ttl=1e12)
    box.put([one])
    spare = threading.Thread(target=box.take, kwargs={"spare": True})
    spare.start()
    taken = box.take()
    assert taken is one
    timer = threading.Timer(0.05, box.finish, (one, reply(one)))
    timer.start()
    box.wait([one], seconds)
    assert one.reply is not None
    box.close()
    spare.join(5)
    assert not spare.is_alive()


def test_a_spare_lane_takes_letters_only_from_a_server_without_patience() -> None:
    box, letters, taken = Mailbox(), [letter(1, 10), letter(2, 11)], []
    box.put(letters)
    assert box.take() is letters[0]
    spare = threading.Thread(target=lambda: taken.append(box.take(spare=True)))
    spare.start()
    box.wait(letters, 2 * POLLED_S)  # a fourth of this is less than a client may take of one that polls
    spare.join(5)
    assert taken == [letters[1]]
    box.finish(letters[1], reply(letters[1]), spare=True)
    late = letter(3, 12)
    box.put([late])
    spare = threading.Thread(target=lambda: taken.append(box.take(spare=True)))
    spare.start()
    assert box.fetch("1", polled=False) is letters[0]
    time.sleep(2 * POLLED_S)
    assert len(taken) == 1, "nobody polls, and nobody waits for a limited time"
    assert box.fetch("1", polled=True) is letters[0]
    spare.join(5)
    assert taken[1:] == [late]
