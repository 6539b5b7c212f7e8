"""One MoD model of eight layers, to analyse its routing.

Command   modjax train --config=configs/fig5_routing.py --workdir=work/fig5
          for text prepared under the name english, add --config.data.name=english
Cost and expected result: see experiments/fig5_routing/README.md
"""

from base import eight_layers


def get_config():
    return eight_layers("Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())")
