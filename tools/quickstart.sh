#!/usr/bin/env bash
# Set up if need be, then train the embedded default: five generated tasks, one task-routed MoE-BSR model,
# and the last-layer-only baseline beside it. No dataset, no weights, no network beyond the installation.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" views
moe_bsr() { "$python" -m moe_bsr "$@"; }
moe_bsr train configs/quickstart_last.yaml --run runs/quickstart_last --resume
moe_bsr train configs/quickstart.yaml --run runs/quickstart --resume
moe_bsr compare runs/quickstart_last runs/quickstart --experts
cat <<'END'

What next, after: source .venv/bin/activate
  tensorboard --logdir runs --samples_per_plugin images=100    curves, experts and tokens of both runs
  moe-bsr views runs/quickstart                                all views with ablations, one HTML page
  moe-bsr cost configs/quickstart.yaml --budget 80MB           what it costs, what would make it fit
  moe-bsr evaluate runs/quickstart --split val                 every number, per task
  moe-bsr train configs/quickstart.yaml --dry-run              the plan, block by block
  moe-bsr train configs/quickstart.yaml moe.balance_loss=across_tasks --run runs/across
  moe-bsr init DIR                                             your own image folders: writes the files to train on them
  rm -r runs/quickstart*                                       then this command trains afresh
More: moe-bsr --help, docs/data.md. Real backbones and datasets: moe-bsr configs, moe-bsr tasks.
END
