#!/usr/bin/env bash
# Set up if need be, then train the embedded default: five generated tasks, one task-routed MoE-BSR model,
# and the last-layer-only baseline beside it. No dataset, no weights, no network beyond the installation.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" tools/train.py configs/quickstart_last.yaml --run runs/quickstart_last --resume
"$python" tools/train.py configs/quickstart.yaml --run runs/quickstart --resume
"$python" tools/compare.py runs/quickstart_last runs/quickstart --experts
cat <<'END'

What next:
  .venv/bin/tensorboard --logdir runs --samples_per_plugin images=100    curves, experts and tokens of both runs
  .venv/bin/python tools/expert_views.py runs/quickstart                 all views with ablations, one HTML page
  .venv/bin/python tools/cost.py configs/quickstart.yaml --budget 80MB   what it costs, what would make it fit
  .venv/bin/python tools/evaluate.py runs/quickstart --split val         every number, per task
  .venv/bin/python tools/train.py configs/quickstart.yaml --dry-run      the plan, block by block
  .venv/bin/python tools/train.py configs/quickstart.yaml moe.balance_loss=across_tasks --run runs/across
  rm -r runs/quickstart*                                                 then this command trains afresh
Your own images: docs/data.md. Real backbones and datasets: configs/deit_tiny_moe_bsr.yaml.
END
