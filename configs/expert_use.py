"""One integrated MoDE of eight layers, to analyse which tokens choose which expert or no-op.

Command   modjax train --config=configs/expert_use.py --workdir=work/experts
          for text prepared under the name english, add --config.data.name=english
Cost and expected result: see experiments/expert_use/README.md
"""

from base import eight_layers


def get_config():
    return eight_layers("Seq(Attention(), MoE(4, TokenChoice(no_ops=4)))")
