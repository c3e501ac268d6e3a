#!/usr/bin/env bash
# declearn: round_reset=True of client optimizers and steps_weighted=False of GradientMaskedAveraging never reach the clients.
#
# declearn 2.9.1. The server sends its clients' optimizer and its aggregator in an InitRequest, as what their get_config() tells.
# "round_reset" ("flag to indicate if we reset the internal state to its initial value every time a new round starts") is in the
# get_config() of none of the six modules that have it: Momentum, EWMA, AdaGrad, RMSProp, Adam, Yogi. The client builds them
# with the default, False, and carries its momentum on from round to round. With a gradient of 1, three steps a round and beta
# 0.9, the second round begins with a step of 1 in the server's object, and of 3.44 in the client's. Nor does the get_config() of
# GradientMaskedAveraging have "steps_weighted": a client sends updates that are weighted by its steps, although the server was
# told not to. Updates 1 of ten steps and 4 of ninety average to 3.7 instead of 2.5. Beta, which is in get_config(), arrives, and
# so does steps_weighted of AveragingAggregator. No error and no warning. A server that builds its own optimizer has what it says.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'declearn==2.9.1' 'numpy==2.4.6' 'scikit-learn==1.9.1'
cat > "$here/init.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import numpy as np
from declearn.aggregator import AveragingAggregator, GradientMaskedAveraging
from declearn.messaging import InitRequest, SerializedMessage
from declearn.model.sklearn import NumpyVector, SklearnSGDModel
from declearn.optimizer import Optimizer
from declearn.optimizer.modules import (
    AdaGradModule,
    AdamModule,
    EWMAModule,
    MomentumModule,
    RMSPropModule,
    YogiModule,
)

KINDS = MomentumModule, EWMAModule, AdaGradModule, RMSPropModule, AdamModule, YogiModule


def sent_and_received(aggregator):
    """What the server holds, and what a client makes of the message that the server sends."""
    modules = [kind(round_reset=True) for kind in KINDS] + [MomentumModule(beta=0.5)]
    sent = InitRequest(
        model=SklearnSGDModel.from_parameters("classifier"), optim=Optimizer(lrate=1.0, modules=modules), aggrg=aggregator
    )
    return sent, SerializedMessage.from_bin_message(sent.serialize()).deserialize()


def resets(module):
    return getattr(module, "ewma", module).round_reset


def first_step_of_round_two(module):
    for _ in range(2):
        module.on_round_start()
        steps = [module.run(NumpyVector({"w": np.ones(1)})).coefs["w"][0] for _ in range(3)]
    return f"{steps[0]:.2f}"


def average(aggregator):
    one, other = (
        aggregator.prepare_for_sharing(NumpyVector({"w": np.array([value])}), steps)
        for value, steps in ((1.0, 10), (4.0, 90))
    )
    return f"{aggregator.finalize_updates(one.aggregate(other)).coefs['w'][0]:.1f}"


sent, received = sent_and_received(GradientMaskedAveraging(steps_weighted=False))
for message in (sent, received):
    print("SEEN round_reset:", *(resets(module) for module in message.optim.modules[:6]))
print("SEEN beta:", *(message.optim.modules[6].beta for message in (sent, received)))
print("SEEN momentum:", *(first_step_of_round_two(message.optim.modules[0]) for message in (sent, received)))
print("SEEN masked:", *(average(message.aggrg) for message in (sent, received)))
print("SEEN averaging:", *(average(m.aggrg) for m in sent_and_received(AveragingAggregator(steps_weighted=False))))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" init.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen, at the server and at the client:"
echo "$seen"
[ "$seen" = 'round_reset: True True True True True True
round_reset: False False False False False False
beta: 0.5 0.5
momentum: 1.00 3.44
masked: 2.5 3.7
averaging: 2.5 2.5' ]
echo "as described: the client works with other options than the server was given"
