#!/usr/bin/env bash
# Set up .venv if needed, then train the quickstart: one task-routed MoE-BSR model for five generated tasks, and for
# comparison only the heads. Needs no dataset and no weights, and the network only for the installation.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" views
moe_bsr() { "$python" -m moe_bsr "$@"; }
moe_bsr train configs/quickstart_last.yaml --run runs/quickstart_last --resume
moe_bsr train configs/quickstart.yaml --run runs/quickstart --resume
moe_bsr compare runs/quickstart_last runs/quickstart --experts
cat <<'END'

Next steps, after `source .venv/bin/activate`:
  tensorboard --logdir runs --samples_per_plugin images=100    show curves, experts and tokens of both runs
  moe-bsr views runs/quickstart                                draw all views with ablations, on one HTML page
  moe-bsr cost configs/quickstart.yaml --budget 80MB           predict memory and FLOPs, and what would make it fit
  moe-bsr evaluate runs/quickstart --split val                 print all numbers of each task
  moe-bsr train configs/quickstart.yaml --dry-run              print the plan, block by block
  moe-bsr train configs/quickstart.yaml moe.balance_loss=across_tasks --run runs/across
  moe-bsr init DIR                                             write the files to train on your own image folders
  rm -r runs/quickstart*                                       remove both runs; this script then trains them again
More: moe-bsr --help, docs/data.md. Real backbones and datasets: moe-bsr configs, moe-bsr tasks.
END
