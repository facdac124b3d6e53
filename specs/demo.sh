#!/usr/bin/env bash
# The main job from end to end, with the command line itself: plan, train, evaluate beside the baseline, merge, reload.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs
mkdir -p "$runs"
rm -rf "$runs/demo" "$runs/head_only" "$runs/demo_merged"

say() { printf '\n== %s\n' "$1"; }

say "the plan: what is adapted, with what, and what is known about it"
surgery plan specs/demo.surg

say "the baseline: only the classifier is trained"
surgery train specs/head_only.surg -o "$runs/head_only"

say "Delta-LoRA on every linear of the encoder"
surgery train specs/demo.surg -o "$runs/demo"

say "merged into an ordinary model folder"
surgery merge "$runs/demo" -o "$runs/demo_merged"

# The number behind a name in a JSON object on standard input.
number() { python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

baseline=$(surgery eval "$runs/head_only" --format json | number accuracy)
adapted=$(surgery eval "$runs/demo" --format json | number accuracy)

say "held-out accuracy, 596 rows"
printf '%-52s %.4f\n' "frozen encoder, classifier trained" "$baseline"
printf '%-52s %.4f\n' "Delta-LoRA on every linear, classifier trained" "$adapted"

say "the merged folder in plain transformers"
python specs/check_merged.py "$runs/demo_merged" "$runs/demo" "$adapted"
