#!/usr/bin/env bash
# pfl-research: the PRV accountant's epsilon for Laplace noise grows with the noise: scale 0.1 has epsilon 0.1 instead of 10.
#
# pfl 0.6.0, prv-accountant 0.2.0. `noise_parameter` is "the scale of the noise" for the Laplace mechanism; at scale b and
# sensitivity 1 a single release has epsilon 1 / b + 2 ln(1 - delta). PLDPrivacyAccountant and RDPPrivacyAccountant say so (10,
# 1 and 0.1 for the scales 0.1, 1 and 10). PRVPrivacyAccountant hands the scale to prv_accountant.LaplaceMechanism(mu), where mu
# is the distance of the two distributions in units of the scale, so 1 / b: it says 0.1, 1 and 10. Scale 1 alone agrees, by
# accident. Too little noise thus passes with an epsilon a hundred times too small. Nor does it see the sampling probability: 10
# releases at scale 1 cost 9.98 at probability 1 and at 0.01, where PLD has 10.0 and 0.12. The Gaussian mechanism of the same
# class is right. No warning is given.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'pfl==0.6.0' 'prv-accountant==0.2.0' \
  'dp-accounting==0.5.1' 'numpy==2.4.6'
cat > "$here/laplace.py" <<'PYTHON'
import math

from pfl.privacy.privacy_accountant import PLDPrivacyAccountant, PRVPrivacyAccountant

DELTA = 1e-6


def epsilon(accountant, scale, releases=1, probability=1.0, mechanism="laplace"):
    return float(
        accountant(
            num_compositions=releases,
            sampling_probability=probability,
            mechanism=mechanism,
            noise_parameter=scale,
            delta=DELTA,
        ).epsilon
    )


seen = []
for scale in (0.1, 1.0, 10.0):
    exact = 1 / scale + 2 * math.log(1 - DELTA)
    seen += [exact, epsilon(PLDPrivacyAccountant, scale), epsilon(PRVPrivacyAccountant, scale)]
for accountant in (PLDPrivacyAccountant, PRVPrivacyAccountant):
    seen.append(epsilon(accountant, 1.0, releases=10, probability=0.01))
for accountant in (PLDPrivacyAccountant, PRVPrivacyAccountant):
    seen.append(epsilon(accountant, 1.0, mechanism="gaussian"))
print("SEEN", *(f"{value:.1f}" for value in seen))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" laplace.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: exact, PLD and PRV at scale 0.1, at 1, at 10; ten sampled releases, PLD and PRV; Gaussian, PLD and PRV: $seen"
[ "$seen" = '10.0 10.0 0.1 1.0 1.0 1.0 0.1 0.1 10.0 0.1 10.0 4.9 4.9' ]
echo "as described: PRVPrivacyAccountant's epsilon is the noise scale, and the exact one is its inverse"
