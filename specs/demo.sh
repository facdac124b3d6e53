#!/usr/bin/env bash
# The main job from end to end, with the command line itself: plan, train, evaluate beside the baseline, merge, reload.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs
mkdir -p "$runs"
rm -rf "$runs/demo" "$runs/head_only" "$runs/demo_merged"

say() { printf '\n== %s\n' "$1"; }

# A number in a JSON object on standard input, by the names that lead to it.
number() { python -c 'import functools, json, sys; print(functools.reduce(dict.get, sys.argv[1:], json.load(sys.stdin)))' "$@"; }

say "the plan: what is adapted, with what, and what is known about it"
surgery plan specs/demo.surg

say "the baseline: only the classifier is trained"
baseline=$(surgery train specs/head_only.surg -o "$runs/head_only" --format json | number evaluation accuracy)

say "Delta-LoRA on every linear of the encoder"
surgery train specs/demo.surg -o "$runs/demo"

say "the run, read again and evaluated on the 596 rows that were held out"
adapted=$(surgery eval "$runs/demo" --format json | number accuracy)
printf '%-52s %.4f\n' "accuracy, frozen encoder, classifier trained" "$baseline"
printf '%-52s %.4f\n' "accuracy, Delta-LoRA on every linear as well" "$adapted"

say "merged into an ordinary model folder, read by plain transformers"
surgery merge "$runs/demo" -o "$runs/demo_merged"
python specs/check_merged.py "$runs/demo_merged" "$runs/demo" "$adapted"
