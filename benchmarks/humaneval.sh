#!/usr/bin/env bash
# README's HumanEval table: every arm, then all beside each other. Goes on where it was interrupted.
#
#   benchmarks/humaneval.sh OUT [--limit 16 …]     options as `ponderttt bench humaneval` has them
#   LEARN=path/to/package benchmarks/humaneval.sh OUT     also in a session that has learned it
#
# The server is the one at PONDERTTT_BASE_URL (http://127.0.0.1:8000).
set -euo pipefail
out=${1:?directory for the results}
shift
mkdir -p "$out"
bin=$(dirname "$0")/../.venv/bin/ponderttt

common=("$@")
files=()

arm() { # NAME OPTIONS…
    files+=("$out/$1.jsonl")
    "$bin" bench humaneval --concurrency 16 --output "$out/$1.jsonl" "${@:2}" "${common[@]}"
}

arm off --gate off
for on in prompt generated both; do
    arm "fixed-$on" --gate fixed --action UPDATE_1 --adapt-on "$on"
    arm "threshold-$on" --gate threshold --adapt-on "$on"
    arm "policy-$on" --gate policy --adapt-on "$on"
done
# As requests are that say nothing about learning.
arm default --gate policy --budget 2 --chunk-size 256 --adapt-on prompt

if [[ -n ${LEARN:-} ]]; then
    if [[ ! -e $out/learned.json ]]; then
        "$bin" adapt "$LEARN" --session humaneval-learned --gate policy --budget 2 \
            --json "$out/learned.json"
    fi
    for read in auto session; do
        arm "learned-$read" --session humaneval-learned --read "$read"
    done
fi
"$bin" bench compare "${files[@]}" --json "$out/compare.json"
