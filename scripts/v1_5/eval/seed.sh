#!/usr/bin/env bash
# SEED-Bench, 19,242 questions about images and video frames.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate seed seed_bench "$@"
submit seed jsonl "$@"
