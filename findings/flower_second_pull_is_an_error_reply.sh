#!/usr/bin/env bash
# Flower: pulling a reply twice gives the reply, and then, for the same id, an error in its place.
#
# flwr 1.41.0 with its own simulation. A ServerApp pushes a message, pulls its reply (with content, no error), and pulls the
# same id once more. The second pull neither returns the reply again nor an empty list: it returns a Message with an error,
# code 3 (reply message unavailable), that names the pushed message as the one it answers. A ServerApp that pulls again
# after it lost an answer, or that polls all its ids in each turn, therefore counts a node that has answered as failed.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr[simulation]==1.41.0'
cat > "$here/twice.py" <<'PYTHON'
import json
import logging
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

logging.getLogger("flwr").setLevel(logging.ERROR)
server, client = ServerApp(), ClientApp()


@client.query()
def answer(message, context):
    return Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=message)


@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    asked = list(grid.push_messages([Message(RecordDict(), dst_node_id=nodes[0], message_type="query")]))
    while not (first := list(grid.pull_messages(asked))):
        time.sleep(0.1)
    again = list(grid.pull_messages(asked))
    seen = {
        "first": [reply.has_error() for reply in first],
        "again": [[reply.has_error(), reply.error.code if reply.has_error() else None] for reply in again],
        "same": [reply.metadata.reply_to_message_id == asked[0] for reply in again],
    }
    print("SEEN", json.dumps(seen), flush=True)


run_simulation(server, client, num_supernodes=1)
PYTHON
seen=$(cd "$here" && "$here/venv/bin/python" twice.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: $seen"
[ "$seen" = '{"first": [false], "again": [[true, 3]], "same": [true]}' ]
echo "as described: the second pull of a reply is an error reply, code 3"
